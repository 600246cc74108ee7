"""Measures the rates of this machine that are not cached yet, off the event loop, and caches them."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.machine.contention import Contention
from layerstream.pipeline.machine.measurement import ComputeRate, Figure, Origin, Rate
from layerstream.pipeline.machine.probe_blocks import measure_blocks
from layerstream.pipeline.machine.probe_cache import (
    PER_BYTE,
    MeasuredRates,
    MeasurementCache,
    machine_identity,
)
from layerstream.pipeline.machine.probe_compute import (
    TOKENS,
    block_shapes,
    main_dtype,
    measure_compute,
)
from layerstream.pipeline.machine.probe_copies import measure_copies
from layerstream.pipeline.machine.probe_disk import MIN_BYTES, measure_direct, measure_mmap
from layerstream.pipeline.machine.volumes import files_by_volume
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import LayerstreamError
from layerstream.stages.threads import finish_in_thread

__all__ = ["ProbedRates", "probe_rates"]

logger = logging.getLogger(__name__)

# For each reader of the pipeline: its name, the rates, and the function that measures them.
_DISK_READERS = (
    (
        "direct",
        ("disk_bytes_per_second", f"direct_read_cpu_seconds{PER_BYTE}"),
        measure_direct,
    ),
    ("mmap", ("mmap_bytes_per_second", f"mmap_read_cpu_seconds{PER_BYTE}"), measure_mmap),
)
_COPY_RATES = (
    "host_copy_bytes_per_second",
    "h2d_bytes_per_second",
    "pageable_h2d_bytes_per_second",
)
_BLOCK_RATES = (
    "attention_flops_per_second",
    "step_attention_flops_per_second",
    "kv_growth_bytes_per_second",
    "blocks_per_second",
)
# If the volumes with a known rate hold at least this share of the checkpoint, that is its rate: one small file on
# another volume does not matter.
_MIN_SHARE = 0.9
# Best sample to median. On a quiet machine it is below 1.5; next to other work, 10 has been seen.
_DISTURBED_RATIO = 2.0
# If the rates of several volumes have different origins, the last one of them counts.
_BY_INCREASING_DOUBT = (Origin.MEASURED, Origin.CACHED, Origin.CONTENDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedRates:
    """Values for fields of Hardware, with the origin of each."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """One measurement that can be made, with a cache entry of its own."""

    key: Mapping[str, str]
    """What the rates depend on, and under "of" what is measured."""
    names: Collection[str]
    """Of the rates that it measures."""
    affected_by_contention: bool
    """Whether other processes that keep processors busy change the result."""
    measure: Callable[[], Mapping[str, Rate]]
    share: float = 1.0
    """Of the checkpoint's bytes, for which the rates hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _VolumeRate:
    """A rate, and for which share of the checkpoint it holds."""

    rate: Rate
    share: float
    origin: Origin
    age_seconds: float


async def probe_rates(
    checkpoint: Checkpoint,
    device: Device,
    *,
    fresh: bool,
    measure: bool,
    cache: MeasurementCache,
) -> ProbedRates:
    """Load or measure the rates of this machine that a plan for ``checkpoint`` depends on.

    For a checkpoint below 64 MiB, nothing is measured and only cached rates of larger ones are used: it is too small to
    measure a rate, and streams in less time than a measurement takes.

    Args:
        checkpoint: The files that will be read.
        device: Where computation will run.
        fresh: Measure again, even rates that are cached.
        measure: If False, nothing is measured.
        cache: The results of earlier measurements.
    """
    probes = await finish_in_thread(lambda: _probes(checkpoint, device))
    measure = measure and checkpoint.total_bytes >= MIN_BYTES
    found = []
    # One after another: concurrent measurements would disturb each other.
    for probe in probes:
        # One thread call for each, so that a cancellation takes effect between two of them.
        result = await finish_in_thread(
            partial(_load_or_measure, probe, cache, fresh=fresh and measure, measure=measure)
        )
        if result is not None:
            found.append((probe, *result))
    return _combine(found)


def _probes(checkpoint: Checkpoint, device: Device) -> list[_Probe]:
    machine_key = machine_identity()
    device_key = {
        **machine_key,
        "device": f"{device.torch_device} {device.model_name()}",
        "torch": str(torch.__version__),
        # The setting of the calling thread, which is that of all threads unless they change it.
        "threads": str(torch.get_num_threads()),
    }
    dtype, shapes = main_dtype(checkpoint), block_shapes(checkpoint)
    sizes = " ".join(f"{rows}x{width}" for rows, width in shapes)
    return [
        *_disk_probes(checkpoint, machine_key),
        _Probe(
            key={**device_key, "of": "copies"},
            names=_COPY_RATES,
            affected_by_contention=True,
            measure=partial(measure_copies, device),
        ),
        _Probe(
            key={**device_key, "of": "blocks", "dtype": dtype},
            names=_BLOCK_RATES,
            affected_by_contention=True,
            measure=partial(measure_blocks, device, dtype=dtype),
        ),
        _Probe(
            key={**device_key, "of": "compute", "dtype": dtype, "shapes": sizes},
            names=[str(tokens) for tokens in TOKENS],
            affected_by_contention=True,
            measure=partial(measure_compute, device, shapes=shapes, dtype=dtype),
        ),
    ]


def _disk_probes(checkpoint: Checkpoint, machine_key: Mapping[str, str]) -> list[_Probe]:
    paths = [file.path for file in checkpoint.files]
    total = sum(file.size_bytes for file in checkpoint.files)
    return [
        _Probe(
            key={**machine_key, "of": f"disk-{reader}", "volume": volume},
            names=names,
            affected_by_contention=False,  # a shared disk does not show in these, and is likely to stay shared
            measure=partial(measure, paths, files),
            share=sum(checkpoint.files[file].size_bytes for file in files) / total,
        )
        for volume, files in _files_by_volume(paths).items()
        for reader, names, measure in _DISK_READERS
    ]


def _files_by_volume(paths: Sequence[Path]) -> dict[str, list[int]]:
    try:
        return files_by_volume(paths)
    except OSError as error:
        logger.warning("the disk is not measured: %s", error)
        return {}


def _load_or_measure(
    probe: _Probe, cache: MeasurementCache, *, fresh: bool, measure: bool
) -> tuple[MeasuredRates, Origin] | None:
    if not fresh:
        cached = cache.load(probe.key, names=probe.names)
        if cached is not None:
            return cached, Origin.CONTENDED if cached.contended else Origin.CACHED
    if not measure:
        return None
    what = probe.key["of"]
    try:
        with Contention() as contention:
            rates = probe.measure()
    except (LayerstreamError, OSError, RuntimeError) as error:  # RuntimeError: torch's
        logger.warning("measuring %s failed, the rate is not known: %s", what, error)
        return None
    if not rates:
        return None
    for name, rate in rates.items():
        logger.info("%s: %s is %.3g (%.3g to %.3g)", what, name, rate.median, rate.least, rate.most)
    contended = probe.affected_by_contention and contention.matters
    if contended:
        logger.info("%s: other processes kept %.1f processors busy", what, contention.processors)
    if _was_disturbed(rates) and not contended:
        logger.info("%s: the samples differ so much that they are not cached", what)
    else:
        cache.store(probe.key, rates, contended=contended)
    found = MeasuredRates(rates=rates, age_seconds=0.0, contended=contended)
    return found, Origin.CONTENDED if contended else Origin.MEASURED


def _was_disturbed(rates: Mapping[str, Rate]) -> bool:
    """Return whether something else seems to have slowed some samples, so that they should not be cached."""
    # More tokens never make products with weights faster: if they seem to, the smaller pass was disturbed.
    sizes = [rates[str(tokens)].median for tokens in TOKENS if str(tokens) in rates]
    if any(more > 2 * _DISTURBED_RATIO * fewer for fewer, more in pairwise(sizes)):
        return True
    return any(
        rate.most > _DISTURBED_RATIO * rate.median
        for name, rate in rates.items()
        if not name.endswith(PER_BYTE)
    )


def _combine(found: Sequence[tuple[_Probe, MeasuredRates, Origin]]) -> ProbedRates:
    fields: dict[str, Any] = {}
    figures: dict[str, Figure] = {}
    parts_by_name: dict[str, list[_VolumeRate]] = {}
    for probe, measured, origin in found:
        age = measured.age_seconds
        if probe.key["of"] == "compute":
            fields["compute"] = tuple(
                ComputeRate(
                    tokens=tokens,
                    bytes_per_second=_representative_value(measured.rates[str(tokens)], origin),
                )
                for tokens in TOKENS
                if str(tokens) in measured.rates
            )
            samples = sum(rate.samples for rate in measured.rates.values())
            figures["compute"] = Figure(origin=origin, samples=samples, age_seconds=age)
            continue
        for name, rate in measured.rates.items():
            part = _VolumeRate(rate=rate, share=probe.share, origin=origin, age_seconds=age)
            parts_by_name.setdefault(name, []).append(part)
    for name, parts in parts_by_name.items():
        if sum(part.share for part in parts) < _MIN_SHARE:
            logger.info("%s is not known: it was measured on some of the volumes only", name)
            continue
        values = [(_representative_value(part.rate, part.origin), part.share) for part in parts]
        fields[name] = _mean_over_volumes(name, values)
        figures[name] = Figure(
            origin=max((part.origin for part in parts), key=_BY_INCREASING_DOUBT.index),
            least=_mean_over_volumes(name, [(part.rate.least, part.share) for part in parts]),
            most=_mean_over_volumes(name, [(part.rate.most, part.share) for part in parts]),
            samples=sum(part.rate.samples for part in parts),
            age_seconds=max(part.age_seconds for part in parts),
        )
    return ProbedRates(fields=fields, figures=figures)


def _representative_value(rate: Rate, origin: Origin) -> float:
    """Return the median, or the best sample if processors were contended: then that is closer to the machine."""
    return rate.most if origin is Origin.CONTENDED else rate.median


def _mean_over_volumes(name: str, values: Sequence[tuple[float, float]]) -> float:
    """Return the rate of reading all volumes one after another, as a sweep does.

    Args:
        name: The field's name, whose ending says whether it is a rate or a cost per byte.
        values: Pairs of a volume's value and its share of the bytes.
    """
    if len(values) == 1:
        return values[0][0]  # without rounding
    shares = sum(share for _, share in values)
    if name.endswith(PER_BYTE):
        return sum(value * share for value, share in values) / shares
    return shares / sum(share / value for value, share in values)
