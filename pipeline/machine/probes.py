"""The measurements that can be made for a plan: what their rates depend on, and the memory that they take."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.machine.combined_rates import UNPACKING
from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.probe_blocks import BLOCKS_BYTES, measure_blocks
from layerstream.pipeline.machine.probe_cache import PER_BYTE, machine_identity
from layerstream.pipeline.machine.probe_compute import (
    TOKENS,
    block_shapes,
    compute_bytes,
    main_dtype,
    measure_compute,
)
from layerstream.pipeline.machine.probe_copies import COPIES_BYTES, measure_copies
from layerstream.pipeline.machine.probe_disk import DIRECT_BYTES, measure_direct, measure_mmap
from layerstream.pipeline.machine.probe_unpacking import (
    TILE_BYTES,
    encodings_of,
    measure_unpacking,
    rate_names,
    unpacking_bytes,
)
from layerstream.pipeline.machine.volumes import files_by_volume
from layerstream.stages.devices.protocol import Device
from layerstream.stages.unpack.compiling import kernels_digest

__all__ = ["Probe", "probes_of"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
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


def probes_of(
    checkpoint: Checkpoint,
    device: Device,
    dtype: str | None,
    *,
    free_bytes: int,
    limit: int | None,
) -> list[Probe]:
    """What a plan for ``checkpoint`` depends on.

    Args:
        checkpoint: The files that will be read.
        device: Where computation will run.
        dtype: What is computed in; None: what most weights are, or are unpacked to.
        free_bytes: Host memory that is free.
        limit: What measuring may take of it; None: as much as it would.
    """
    machine_key = machine_identity()
    device_key = {
        **machine_key,
        "device": f"{device.torch_device} {device.model_name()}",
        "torch": str(torch.__version__),
        # The setting of the calling thread, which is that of all threads unless they change it.
        "threads": str(torch.get_num_threads()),
    }
    dtype = dtype or main_dtype(checkpoint)
    # A GPU unpacks by tensor operations, whose rate is assumed.
    encodings = encodings_of(checkpoint) if device.reads_host_images else ()
    return [
        *_disk_probes(checkpoint, machine_key),
        Probe(
            key={**device_key, "of": "copies"},
            names=_COPY_RATES,
            affected_by_contention=True,
            measure=partial(measure_copies, device),
            takes_bytes=COPIES_BYTES,
        ),
        Probe(
            key={**device_key, "of": "blocks", "dtype": dtype},
            names=_BLOCK_RATES,
            affected_by_contention=True,
            measure=partial(measure_blocks, device, dtype=dtype),
            takes_bytes=BLOCKS_BYTES,
        ),
        _compute_probe(checkpoint, device, device_key, dtype, free_bytes=free_bytes, limit=limit),
        *(
            _unpacking_probe(encoding, device_key, dtype, free_bytes=free_bytes, limit=limit)
            for encoding in encodings
        ),
    ]


def _compute_probe(
    checkpoint: Checkpoint,
    device: Device,
    device_key: Mapping[str, str],
    dtype: str,
    *,
    free_bytes: int,
    limit: int | None,
) -> Probe:
    shapes = block_shapes(checkpoint)

    def taking(available_bytes: int) -> int:
        return compute_bytes(device, shapes=shapes, dtype=dtype, available_bytes=available_bytes)

    available = free_bytes if limit is None else limit
    sizes = " ".join(f"{rows}x{width}" for rows, width in shapes)
    return Probe(
        key={**device_key, "of": "compute", "dtype": dtype, "shapes": sizes},
        names=[str(tokens) for tokens in TOKENS],
        affected_by_contention=True,
        measure=partial(
            measure_compute, device, shapes=shapes, dtype=dtype, available_bytes=available
        ),
        takes_bytes=taking(available),
        limited_to_bytes=limit if taking(available) < taking(free_bytes) else None,
    )


def _unpacking_probe(
    encoding: str,
    device_key: Mapping[str, str],
    dtype: str,
    *,
    free_bytes: int,
    limit: int | None,
) -> Probe:
    available = free_bytes if limit is None else limit
    return Probe(
        key={
            **device_key,
            "of": f"{UNPACKING}{encoding}",
            "dtype": dtype,
            "tile": str(TILE_BYTES),
            "kernels": kernels_digest(),
        },
        names=rate_names(encoding),
        affected_by_contention=True,
        measure=partial(measure_unpacking, [encoding], dtype=dtype, available_bytes=available),
        takes_bytes=unpacking_bytes(available),
        limited_to_bytes=limit
        if unpacking_bytes(available) < unpacking_bytes(free_bytes)
        else None,
    )


def _disk_probes(checkpoint: Checkpoint, machine_key: Mapping[str, str]) -> list[Probe]:
    paths = [file.path for file in checkpoint.files]
    total = sum(file.size_bytes for file in checkpoint.files)
    return [
        Probe(
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
