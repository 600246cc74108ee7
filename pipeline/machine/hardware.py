"""The machine that a plan is made for: its free memory, and its rates."""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.machine.measurement import ComputeRate, Figure, Origin, UnpackingRate
from layerstream.pipeline.machine.probe import ProbedRates, probe_rates
from layerstream.pipeline.machine.probe_cache import MeasurementCache
from layerstream.pipeline.machine.probe_disk import cached_bytes
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import LayerstreamError, PlanError
from layerstream.stages.experts.usage import ExpertUsage
from layerstream.stages.process.headroom import address_space_left, host_available_bytes
from layerstream.stages.process.libraries import LibraryMemory, limit_library_memory
from layerstream.stages.threads import finish_in_thread

__all__ = ["ComputeRate", "Figure", "Hardware", "Origin", "UnpackingRate"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machine that a plan is made for; constructed directly instead of by ``probe``, a what-if.

    Unknown rates are None.

    Raises:
        PlanError: A rate is not above zero, a size is negative, or there are no cores.
    """

    device: str
    """"cpu" or "cuda:0"."""
    host_available_bytes: int
    vram_free_bytes: int | None
    """None on a CPU device."""
    cores: int
    """The processors that this process may use."""
    address_space_bytes: int | None = None
    """Address space that this process may still take; None without a limit (``ulimit -v``)."""
    disk_bytes_per_second: float | None = None
    """Direct reads, as the pipeline makes them."""
    mmap_bytes_per_second: float | None = None
    """Page faults in mapped files that are not in the page cache."""
    cached_bytes: int = 0
    """How much of the checkpoint's files is in the page cache now."""
    h2d_bytes_per_second: float | None = None
    """Host to device, from page-locked memory."""
    pageable_h2d_bytes_per_second: float | None = None
    """Host to device, from ordinary memory."""
    host_copy_bytes_per_second: float | None = None
    """Host to host, in one thread."""
    compute: tuple[ComputeRate, ...] = ()
    """By ascending tokens."""
    unpacking: tuple[UnpackingRate, ...] = ()
    """Of packed weights, one for each encoding that is known."""
    attention_flops_per_second: float | None = None
    """In a long prompt; 4 for each pair of tokens and each element of a head."""
    step_attention_flops_per_second: float | None = None
    """The same, for one token over a long KV cache."""
    kv_growth_bytes_per_second: float | None = None
    """Appending to a KV cache, which transformers copies for each token."""
    blocks_per_second: float | None = None
    """Tiny decoder blocks, whose time is that of Python and kernel launches."""
    direct_read_cpu_seconds_per_byte: float | None = None
    """Processor time of direct reads, all threads together."""
    mmap_read_cpu_seconds_per_byte: float | None = None
    """Processor time of page faults in mapped files."""
    overhead_seconds_per_batch: float | None = None
    """Passing a layer batch through the stages."""
    expert_usage: Mapping[str, ExpertUsage] = field(default_factory=dict, hash=False)
    """How tokens choose experts, by the paths of the modules of a model that has run here; of others, evenly is assumed."""
    figures: Mapping[str, Figure] = field(default_factory=dict, hash=False)
    """The origin of each rate, by the field's name; a rate without one was given by the caller."""

    def __post_init__(self) -> None:
        if not (_is_number(self.cores) and self.cores >= 1):
            raise PlanError(f"hardware: cores is {self.cores!r}; give a whole number from 1")
        for names, zero, remedy in (
            (_SIZES, True, "the bytes, from 0"),
            (_RATES, False, "a number above zero, or None for unknown"),
            (_COSTS, True, "seconds, from 0, or None for unknown"),
        ):
            for name in names:
                value = getattr(self, name)
                # Written so that NaN is refused too.
                valid = value is None or (_is_number(value) and 0 <= value < math.inf)
                if not valid or (value == 0 and not zero):
                    raise PlanError(f"hardware: {name} is {value!r}; give {remedy}")
        self._check_rates_of_computing()

    def _check_rates_of_computing(self) -> None:
        sizes = [rate.tokens for rate in self.compute]
        if sizes != sorted({size for size in sizes if size >= 1}):
            raise PlanError(
                f"hardware: compute has rates for {sizes} tokens; give each size once, in ascending order, from 1"
            )
        for rate in self.compute:
            if not (_is_number(rate.bytes_per_second) and 0 < rate.bytes_per_second < math.inf):
                raise PlanError(
                    f"hardware: compute at {rate.tokens} tokens has {rate.bytes_per_second!r} bytes per "
                    "second; give a number above zero"
                )
        for each in self.unpacking:
            if not (_is_number(each.bytes_per_second) and 0 < each.bytes_per_second < math.inf):
                raise PlanError(
                    f"hardware: unpacking {each.encoding} has {each.bytes_per_second!r} bytes per second; give a "
                    "number above zero"
                )

    @classmethod
    async def probe(
        cls,
        checkpoint: Checkpoint,
        device: str = "auto",
        *,
        dtype: str | None = None,
        fresh: bool = False,
        measure: bool = True,
        cache_folder: Path | None = None,
        most_bytes: int | None = None,
    ) -> Self:
        """Query the free memory of this machine, and measure rates that are not cached yet.

        Args:
            checkpoint: The files that will be read.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: torch's name of what is computed in; by default what most weights are, or are unpacked to.
            fresh: Measure again, even rates that are cached.
            measure: If False, nothing is measured; rates that are not cached are None.
            cache_folder: Where measurements are cached; by default in the user's cache folder.
            most_bytes: Host memory that measuring may take, such as what is left of a budget; by default most of what is
                free. Rates whose measurement takes more are None, unless they are cached.

        Raises:
            DeviceError: There is no such device.
        """
        opened = await finish_in_thread(lambda: open_device(device))
        if measure and opened.reads_host_images:
            # oneDNN reads its settings only before the first product, which the measurements make.
            limit_library_memory()
        rates = await probe_rates(
            checkpoint,
            opened,
            dtype=dtype,
            fresh=fresh,
            measure=measure,
            cache=MeasurementCache(cache_folder),
            most_bytes=most_bytes,
        )
        if measure and opened.reads_host_images:
            await finish_in_thread(LibraryMemory().release)
        # Last, when measurements have freed their own memory.
        return await finish_in_thread(lambda: cls._with_free_memory(checkpoint, opened, rates))

    @classmethod
    def _with_free_memory(cls, checkpoint: Checkpoint, device: Device, rates: ProbedRates) -> Self:
        vram = device.free_bytes()
        space = address_space_left()
        unknown = {"vram_free_bytes": vram is None, "address_space_bytes": space is None}
        sizes = [name for name in _SIZES if not unknown.get(name)]
        size_figures = dict.fromkeys(
            sizes, Figure(origin=Origin.MEASURED, samples=1, age_seconds=0.0)
        )
        return cls(
            device=str(device.torch_device),
            host_available_bytes=host_available_bytes(),
            vram_free_bytes=vram,
            cores=len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
            address_space_bytes=space,
            cached_bytes=_page_cache_bytes(checkpoint),
            figures={**size_figures, **rates.figures},
            **rates.fields,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _page_cache_bytes(checkpoint: Checkpoint) -> int:
    space = address_space_left()
    if space is not None and space < checkpoint.total_bytes:
        return 0  # which only a mapping could tell
    try:
        return cached_bytes([file.path for file in checkpoint.files])
    except (LayerstreamError, OSError) as error:
        # A file was removed after it was opened: reading it will report that.
        logger.warning("the contents of the page cache are not known: %s", error)
        return 0


_SIZES = ("host_available_bytes", "vram_free_bytes", "address_space_bytes", "cached_bytes")
_RATES = (
    "disk_bytes_per_second",
    "mmap_bytes_per_second",
    "h2d_bytes_per_second",
    "pageable_h2d_bytes_per_second",
    "host_copy_bytes_per_second",
    "attention_flops_per_second",
    "step_attention_flops_per_second",
    "kv_growth_bytes_per_second",
    "blocks_per_second",
)
_COSTS = (
    "direct_read_cpu_seconds_per_byte",
    "mmap_read_cpu_seconds_per_byte",
    "overhead_seconds_per_batch",
)
