"""Measures the rates of a machine that are not known yet, off the event loop, and caches them."""

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
from layerstream.pipeline.machine.probe_cache import PER_BYTE, Measured, MeasuredCache, machine
from layerstream.pipeline.machine.probe_compute import (
    TOKENS,
    block_shapes,
    main_dtype,
    measure_compute,
    measure_copies,
)
from layerstream.pipeline.machine.probe_disk import LEAST_BYTES, measure_direct, measure_mmap
from layerstream.pipeline.machine.volumes import volumes
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import LayerstreamError
from layerstream.stages.threads import finish_in_thread

__all__ = ["ProbedRates", "probe_rates"]

logger = logging.getLogger(__name__)

_READERS = (
    (
        "direct",
        ("disk_bytes_per_second", f"direct_read_cpu_seconds{PER_BYTE}"),
        measure_direct,
    ),
    ("mmap", ("mmap_bytes_per_second", f"mmap_read_cpu_seconds{PER_BYTE}"), measure_mmap),
)
_COPIES = (
    "host_copy_bytes_per_second",
    "h2d_bytes_per_second",
    "pageable_h2d_bytes_per_second",
)
_BLOCKS = (
    "attention_flops_per_second",
    "step_attention_flops_per_second",
    "kv_growth_bytes_per_second",
    "blocks_per_second",
)
# Volumes with a smaller share of the checkpoint, such as one small file elsewhere, do not affect its rate.
_LEAST_SHARE = 0.9
# A quiet machine's best sample is within half of its median; next to other work, ten times has been seen.
_DISTURBED = 2.0
# Of several origins, the last one here counts.
_DOUBT = (Origin.MEASURED, Origin.CACHED, Origin.CONTENDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedRates:
    """Fields of Hardware, with the origin of each."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """One measurement, with a cache entry of its own."""

    key: Mapping[str, str]
    """What the rates depend on."""
    names: Collection[str]
    """Of the rates."""
    of_processors: bool
    """Other processes that keep processors busy change the result."""
    measure: Callable[[], Mapping[str, Rate]]
    share: float = 1.0
    """Of the checkpoint's bytes that it represents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A rate of one volume."""

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
    cache: MeasuredCache,
) -> ProbedRates:
    """The rates of this machine that a plan for ``checkpoint`` depends on.

    A checkpoint below 64 MiB gets those that are known from larger ones, and no others: it is too small to measure a
    rate, and streams in less time than a measurement takes.

    Args:
        checkpoint: The files that will be read.
        device: Where computation will run.
        fresh: Measure again, even rates that are known.
        measure: False measures nothing.
        cache: Of earlier measurements.
    """
    subjects = await finish_in_thread(lambda: _subjects(checkpoint, device))
    measure = measure and checkpoint.total_bytes >= LEAST_BYTES
    found = []
    # One after another: at the same time, they would disturb each other.
    for subject in subjects:
        # A thread for each, so that a cancellation takes effect between two of them.
        known = await finish_in_thread(
            partial(_known, subject, cache, fresh=fresh and measure, measure=measure)
        )
        if known is not None:
            found.append((subject, *known))
    return _combined(found)


def _subjects(checkpoint: Checkpoint, device: Device) -> list[_Subject]:
    here = machine()
    there = {
        **here,
        "device": f"{device.torch_device} {device.model_name()}",
        "torch": str(torch.__version__),
        # The setting of the calling thread, which is that of all threads unless they change it.
        "threads": str(torch.get_num_threads()),
    }
    dtype, shapes = main_dtype(checkpoint), block_shapes(checkpoint)
    sizes = " ".join(f"{rows}x{width}" for rows, width in shapes)
    return [
        *_disk_subjects(checkpoint, here),
        _Subject(
            key={**there, "of": "copies"},
            names=_COPIES,
            of_processors=True,
            measure=partial(measure_copies, device),
        ),
        _Subject(
            key={**there, "of": "blocks", "dtype": dtype},
            names=_BLOCKS,
            of_processors=True,
            measure=partial(measure_blocks, device, dtype=dtype),
        ),
        _Subject(
            key={**there, "of": "compute", "dtype": dtype, "shapes": sizes},
            names=[str(tokens) for tokens in TOKENS],
            of_processors=True,
            measure=partial(measure_compute, device, shapes=shapes, dtype=dtype),
        ),
    ]


def _disk_subjects(checkpoint: Checkpoint, here: Mapping[str, str]) -> list[_Subject]:
    paths = [file.path for file in checkpoint.files]
    total = sum(file.size_bytes for file in checkpoint.files)
    return [
        _Subject(
            key={**here, "of": f"disk-{reader}", "volume": volume},
            names=names,
            of_processors=False,  # sharing a disk does not show in these, and is likely to last
            measure=partial(measure, paths, files),
            share=sum(checkpoint.files[file].size_bytes for file in files) / total,
        )
        for volume, files in _volumes(paths).items()
        for reader, names, measure in _READERS
    ]


def _volumes(paths: Sequence[Path]) -> dict[str, list[int]]:
    try:
        return volumes(paths)
    except OSError as error:
        logger.warning("the disk is not measured: %s", error)
        return {}


def _known(
    subject: _Subject, cache: MeasuredCache, *, fresh: bool, measure: bool
) -> tuple[Measured, Origin] | None:
    if not fresh:
        cached = cache.load(subject.key, names=subject.names)
        if cached is not None:
            return cached, Origin.CONTENDED if cached.contended else Origin.CACHED
    if not measure:
        return None
    what = subject.key["of"]
    try:
        with Contention() as contention:
            rates = subject.measure()
    except (LayerstreamError, OSError, RuntimeError) as error:  # RuntimeError: torch's
        logger.warning("measuring %s failed, the rate is not known: %s", what, error)
        return None
    if not rates:
        return None
    for name, rate in rates.items():
        logger.info("%s: %s is %.3g (%.3g to %.3g)", what, name, rate.median, rate.least, rate.most)
    contended = subject.of_processors and contention.matters
    if contended:
        logger.info("%s: others kept %.1f processors busy meanwhile", what, contention.processors)
    if _disturbed(rates) and not contended:
        logger.info("%s: the samples differ so much that they are not kept for the next time", what)
    else:
        cache.store(subject.key, rates, contended=contended)
    found = Measured(rates=rates, age_seconds=0.0, contended=contended)
    return found, Origin.CONTENDED if contended else Origin.MEASURED


def _disturbed(rates: Mapping[str, Rate]) -> bool:
    """Whether something else kept the machine busy, so that the result should not be kept for a week."""
    # Weights are never used faster with more tokens: if it seems so, the smaller pass was disturbed.
    sizes = [rates[str(tokens)].median for tokens in TOKENS if str(tokens) in rates]
    if any(more > 2 * _DISTURBED * fewer for fewer, more in pairwise(sizes)):
        return True
    return any(
        rate.most > _DISTURBED * rate.median
        for name, rate in rates.items()
        if not name.endswith(PER_BYTE)
    )


def _combined(found: Sequence[tuple[_Subject, Measured, Origin]]) -> ProbedRates:
    fields: dict[str, Any] = {}
    figures: dict[str, Figure] = {}
    parts: dict[str, list[_Part]] = {}
    for subject, measured, origin in found:
        age = measured.age_seconds
        if subject.key["of"] == "compute":
            fields["compute"] = tuple(
                ComputeRate(
                    tokens=tokens,
                    bytes_per_second=_value(measured.rates[str(tokens)], origin),
                )
                for tokens in TOKENS
                if str(tokens) in measured.rates
            )
            samples = sum(rate.samples for rate in measured.rates.values())
            figures["compute"] = Figure(origin=origin, samples=samples, age_seconds=age)
            continue
        for name, rate in measured.rates.items():
            part = _Part(rate=rate, share=subject.share, origin=origin, age_seconds=age)
            parts.setdefault(name, []).append(part)
    for name, several in parts.items():
        if sum(part.share for part in several) < _LEAST_SHARE:
            logger.info("%s is not known: it was measured on some of the volumes only", name)
            continue
        values = [(_value(part.rate, part.origin), part.share) for part in several]
        fields[name] = _mean(name, values)
        figures[name] = Figure(
            origin=max((part.origin for part in several), key=_DOUBT.index),
            least=_mean(name, [(part.rate.least, part.share) for part in several]),
            most=_mean(name, [(part.rate.most, part.share) for part in several]),
            samples=sum(part.rate.samples for part in several),
            age_seconds=max(part.age_seconds for part in several),
        )
    return ProbedRates(fields=fields, figures=figures)


def _value(rate: Rate, origin: Origin) -> float:
    """The value to use. If other processes kept processors busy, the best sample is closer to the machine than the median."""
    return rate.most if origin is Origin.CONTENDED else rate.median


def _mean(name: str, values: Sequence[tuple[float, float]]) -> float:
    """The rate of reading all volumes one after another, as a sweep does.

    Args:
        name: Of the field: bytes per second, or something per byte.
        values: Pairs of a volume's value and its share of the bytes.
    """
    if len(values) == 1:
        return values[0][0]  # exactly
    shares = sum(share for _, share in values)
    if name.endswith(PER_BYTE):
        return sum(value * share for value, share in values) / shares
    return shares / sum(share / value for value, share in values)
