"""The other floor: how fast a GPU takes bytes from host memory, and how long page-locking takes.

Made with torch alone, not with the library's own device, whose faults it would share. Rehearsing, without a
GPU, host memory plays the device's.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from layerstream.stages.devices.lookup import open_device
from layerstream.stages.memory import HostMemory
from layerstream.stages.process.headroom import host_available_bytes

__all__ = ["Accelerator", "Peak", "Pinning", "copy_rate", "make_room", "pinning"]

# Bytes moved per measurement and block size: at 50 GB/s some 80 ms, long beside a timer and a launch.
_COPIED_BYTES = 4 << 30
# While room is made: taken at a time, and left alone. A machine that gives no more for so long has no more.
_STEP_BYTES = 1 << 30
_LEFT_BYTES = 2 << 30
_PATIENCE_SECONDS = 5.0
# The driver keeps no peak of its own. Rings and residents are there for long; asked more often, it would be in
# the way of what is measured.
_WATCH_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most that was taken of a device's memory, above what was taken before."""

    allocated_bytes: int
    """By torch's counter: what tensors take."""
    driver_bytes: int
    """By the driver's: also what torch's allocator keeps, and loaded kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """The GPU that is measured, or, rehearsing, the processor that stands in for it."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        """Whether what is measured says anything about a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until everything given to the device is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def describe(self) -> dict[str, Any]:
        """What the device is."""
        if not self.is_gpu:
            return {"name": "none: rehearsed on the CPU", "torch": torch.__version__}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }

    @contextmanager
    def watched(self) -> Iterator[Callable[[], Peak]]:
        """Watch the device's memory during the body; the function tells the most that was taken since its beginning."""
        if not self.is_gpu:
            yield lambda: Peak(allocated_bytes=0, driver_bytes=0)
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        free = least = torch.cuda.mem_get_info(self.device)[0]
        over = threading.Event()

        def watch() -> None:
            nonlocal least
            while not over.wait(_WATCH_SECONDS):
                least = min(least, torch.cuda.mem_get_info(self.device)[0])

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield lambda: Peak(
                allocated_bytes=torch.cuda.max_memory_allocated(self.device) - allocated,
                driver_bytes=free - least,
            )
        finally:
            over.set()
            watching.join()

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that ``work`` takes, the device's share included."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began


def copy_rate(
    accelerator: Accelerator, *, block_bytes: int, pinned: bool, total_bytes: int = _COPIED_BYTES
) -> float:
    """Bytes per second of copies of ``block_bytes`` to the device, one after the other on one stream."""
    pin = pinned and accelerator.is_gpu
    # Enough blocks to leave the processor's caches.
    blocks = max(2, min(total_bytes, 1 << 30) // block_bytes)
    source = torch.empty(blocks * block_bytes, dtype=torch.uint8, pin_memory=pin).fill_(1)
    target = torch.empty(block_bytes, dtype=torch.uint8, device=accelerator.device)
    count = max(blocks, total_bytes // block_bytes)

    def copies() -> None:
        for number in range(count):
            start = number % blocks * block_bytes
            target.copy_(source[start : start + block_bytes], non_blocking=pin)

    accelerator.seconds(lambda: target.copy_(source[:block_bytes]))
    return count * block_bytes / accelerator.seconds(copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinning:
    """What page-locking costs."""

    registered_bytes_per_second: float
    """The library's way: touched, then registered in one piece."""
    torch_bytes_per_second: float
    """torch's own allocator, which rounds up to a power of two."""


def pinning(accelerator: Accelerator, *, nbytes: int) -> Pinning:
    """How fast ``nbytes`` of host memory are made ready for copies."""
    device = open_device(str(accelerator.device))
    began = time.perf_counter()
    memory = device.host_memory(nbytes)
    registered = time.perf_counter() - began
    device.release_host_memory(memory)
    began = time.perf_counter()
    other = torch.empty(nbytes, dtype=torch.uint8, pin_memory=accelerator.is_gpu)
    allocated = time.perf_counter() - began
    del other
    _empty_host_cache()
    return Pinning(
        registered_bytes_per_second=nbytes / registered,
        torch_bytes_per_second=nbytes / allocated,
    )


def make_room(nbytes: int) -> None:
    """Take host memory until ``nbytes`` are there, and give it back.

    Some virtual machines begin with little RAM and get more as it is used: what is free at first says nothing.
    On others there is either enough from the beginning, or nothing to be gained by waiting.
    """
    taken: list[HostMemory] = []
    ends = time.monotonic() + _PATIENCE_SECONDS
    try:
        while (free := host_available_bytes()) + len(taken) * _STEP_BYTES < nbytes:
            if free > _STEP_BYTES + _LEFT_BYTES:
                taken.append(HostMemory(_STEP_BYTES))
                taken[-1].tensor.zero_()
                ends = time.monotonic() + _PATIENCE_SECONDS
            elif time.monotonic() > ends:
                return
            else:
                time.sleep(0.1)
    finally:
        for memory in taken:
            memory.close()


def _empty_host_cache() -> None:
    """Give back what torch's allocator keeps of page-locked memory: it would, for ever."""
    empty = getattr(torch._C, "_host_emptyCache", None)  # noqa: SLF001 - torch has no public name for it
    if empty is not None and torch.cuda.is_available():
        empty()
