"""Measures the rates of this machine that are not cached yet, off the event loop, and caches them."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.machine.combined_rates import (
    UNPACKING,
    FoundRates,
    ProbedRates,
    combined,
)
from layerstream.pipeline.machine.contention import Contention
from layerstream.pipeline.machine.measurement import (
    Origin,
    Rate,
)
from layerstream.pipeline.machine.probe_blocks import BLOCKS_BYTES, measure_blocks
from layerstream.pipeline.machine.probe_cache import (
    PER_BYTE,
    MeasuredRates,
    MeasurementCache,
    machine_identity,
)
from layerstream.pipeline.machine.probe_compute import (
    TOKENS,
    block_shapes,
    compute_bytes,
    main_dtype,
    measure_compute,
)
from layerstream.pipeline.machine.probe_copies import COPIES_BYTES, measure_copies
from layerstream.pipeline.machine.probe_disk import (
    DIRECT_BYTES,
    MIN_BYTES,
    measure_direct,
    measure_mmap,
)
from layerstream.pipeline.machine.probe_unpacking import (
    TILE_BYTES,
    encodings_of,
    measure_unpacking,
    rate_names,
    unpacking_bytes,
)
from layerstream.pipeline.machine.volumes import files_by_volume
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import LayerstreamError
from layerstream.stages.process.headroom import host_available_bytes
from layerstream.stages.text import format_bytes
from layerstream.stages.threads import finish_in_thread
from layerstream.stages.unpack.compiling import kernels_digest

__all__ = ["ProbedRates", "probe_rates"]

logger = logging.getLogger(__name__)

# For each reader of the pipeline: its name, the rates, the function that measures them, and the memory that it takes.
_DISK_READERS = (
    (
        "direct",
        ("disk_bytes_per_second", f"direct_read_cpu_seconds{PER_BYTE}"),
        measure_direct,
        DIRECT_BYTES,
    ),
    ("mmap", ("mmap_bytes_per_second", f"mmap_read_cpu_seconds{PER_BYTE}"), measure_mmap, 0),
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
# Best sample to median. On a quiet machine it is below 1.5; next to other work, 10 has been seen.
_DISTURBED_RATIO = 2.0
# A measurement may take so much of the host memory that is free: in a cgroup, the kernel kills a process that takes more.
_MEMORY_SHARE = 0.8


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
    takes_bytes: int
    """Host memory that measuring takes."""
    share: float = 1.0
    """Of the checkpoint's bytes, for which the rates hold."""
    limited_to_bytes: int | None = None
    """What is measured with was limited to this size; None if it was not. Such rates are kept for as small a limit only."""

    @property
    def keys(self) -> Sequence[Mapping[str, str]]:
        """What its rates may be kept under, the best first; those measured now are kept under the last."""
        if self.limited_to_bytes is None:
            return (self.key,)
        return self.key, {**self.key, "limited to": str(self.limited_to_bytes)}


async def probe_rates(
    checkpoint: Checkpoint,
    device: Device,
    *,
    dtype: str | None,
    fresh: bool,
    measure: bool,
    cache: MeasurementCache,
    most_bytes: int | None,
) -> ProbedRates:
    """Load or measure the rates of this machine that a plan for ``checkpoint`` depends on.

    For a checkpoint below 64 MiB, nothing is measured and only cached rates of larger ones are used: it is too small to
    measure a rate, and streams in less time than a measurement takes.

    Args:
        checkpoint: The files that will be read.
        device: Where computation will run.
        dtype: What is computed in; by default what most weights are, or are unpacked to.
        fresh: Measure again, even rates that are cached.
        measure: If False, nothing is measured.
        cache: The results of earlier measurements.
        most_bytes: Host memory that measuring may take, if that is less than what is free.
    """
    free_bytes = await finish_in_thread(host_available_bytes)
    limit = None
    if most_bytes is not None and 0 < most_bytes < free_bytes:
        limit = (
            1 << most_bytes.bit_length() - 1
        )  # so that another limit of about the size finds what is kept
    probes = await finish_in_thread(
        lambda: _probes(checkpoint, device, dtype, free_bytes=free_bytes, limit=limit)
    )
    measure = measure and checkpoint.total_bytes >= MIN_BYTES
    found = []
    # One after another: concurrent measurements would disturb each other.
    for probe in probes:
        # One thread call for each, so that a cancellation takes effect between two of them.
        result = await finish_in_thread(
            partial(
                _load_or_measure,
                probe,
                cache,
                fresh=fresh and measure,
                measure=measure,
                most_bytes=most_bytes,
            )
        )
        if result is not None:
            found.append((probe, *result))
    return combined(
        [
            FoundRates(of=probe.key["of"], share=probe.share, measured=measured, origin=origin)
            for probe, measured, origin in found
        ]
    )


def _probes(
    checkpoint: Checkpoint,
    device: Device,
    dtype: str | None,
    *,
    free_bytes: int,
    limit: int | None,
) -> list[_Probe]:
    available_bytes = free_bytes if limit is None else limit
    machine_key = machine_identity()
    device_key = {
        **machine_key,
        "device": f"{device.torch_device} {device.model_name()}",
        "torch": str(torch.__version__),
        # The setting of the calling thread, which is that of all threads unless they change it.
        "threads": str(torch.get_num_threads()),
    }
    dtype, shapes = dtype or main_dtype(checkpoint), block_shapes(checkpoint)
    sizes = " ".join(f"{rows}x{width}" for rows, width in shapes)
    compute: Any = {"shapes": shapes, "dtype": dtype, "available_bytes": available_bytes}
    # A GPU unpacks by tensor operations, whose rate is assumed.
    encodings = encodings_of(checkpoint) if device.reads_host_images else ()
    return [
        *_disk_probes(checkpoint, machine_key),
        _Probe(
            key={**device_key, "of": "copies"},
            names=_COPY_RATES,
            affected_by_contention=True,
            measure=partial(measure_copies, device),
            takes_bytes=COPIES_BYTES,
        ),
        _Probe(
            key={**device_key, "of": "blocks", "dtype": dtype},
            names=_BLOCK_RATES,
            affected_by_contention=True,
            measure=partial(measure_blocks, device, dtype=dtype),
            takes_bytes=BLOCKS_BYTES,
        ),
        _Probe(
            key={**device_key, "of": "compute", "dtype": dtype, "shapes": sizes},
            names=[str(tokens) for tokens in TOKENS],
            affected_by_contention=True,
            measure=partial(measure_compute, device, **compute),
            takes_bytes=compute_bytes(device, **compute),
            limited_to_bytes=limit
            if compute_bytes(device, **compute)
            < compute_bytes(device, **compute | {"available_bytes": free_bytes})
            else None,
        ),
        *(
            _Probe(
                key={
                    **device_key,
                    "of": f"{UNPACKING}{encoding}",
                    "dtype": dtype,
                    "tile": str(TILE_BYTES),
                    "kernels": kernels_digest(),
                },
                names=rate_names(encoding),
                affected_by_contention=True,
                measure=partial(
                    measure_unpacking, [encoding], dtype=dtype, available_bytes=available_bytes
                ),
                takes_bytes=unpacking_bytes(available_bytes),
                limited_to_bytes=limit
                if unpacking_bytes(available_bytes) < unpacking_bytes(free_bytes)
                else None,
            )
            for encoding in encodings
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
            takes_bytes=takes_bytes,
            share=sum(checkpoint.files[file].size_bytes for file in files) / total,
        )
        for volume, files in _files_by_volume(paths).items()
        for reader, names, measure, takes_bytes in _DISK_READERS
    ]


def _files_by_volume(paths: Sequence[Path]) -> dict[str, list[int]]:
    try:
        return files_by_volume(paths)
    except OSError as error:
        logger.warning("the disk is not measured: %s", error)
        return {}


def _load_or_measure(
    probe: _Probe,
    cache: MeasurementCache,
    *,
    fresh: bool,
    measure: bool,
    most_bytes: int | None,
) -> tuple[MeasuredRates, Origin] | None:
    if not fresh:
        kept = (cache.load(key, names=probe.names) for key in probe.keys)
        cached = next((each for each in kept if each is not None), None)
        if cached is not None:
            return cached, Origin.CONTENDED if cached.contended else Origin.CACHED
    if not measure:
        return None
    what = probe.key["of"]
    free_bytes = _MEMORY_SHARE * host_available_bytes()
    if probe.takes_bytes > (free_bytes if most_bytes is None else min(free_bytes, most_bytes)):
        logger.info(
            "%s: not measured, since that takes %s of memory", what, format_bytes(probe.takes_bytes)
        )
        return None
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
        cache.store(probe.keys[-1], rates, contended=contended)
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
