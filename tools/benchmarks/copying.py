"""The other floor: how fast a GPU takes bytes from host memory, and how long page-locking takes.

Made with torch alone, not with the library's own device, whose faults it would share. Rehearsing, without a
GPU, host memory plays the device's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layerstream.stages.devices import open_device

__all__ = ["Accelerator", "Pinning", "copy_rate", "pinning"]

# Bytes moved per measurement and block size: at 50 GB/s some 80 ms, long beside a timer and a launch.
_COPIED_BYTES = 4 << 30


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

    def begin_peak(self) -> Callable[[], int]:
        """Start counting; the function returned gives the most bytes allocated on the device since, by torch."""
        if not self.is_gpu:
            return lambda: 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        return lambda: torch.cuda.max_memory_allocated(self.device) - before

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

    registered_bytes_per_second: float  # the library's way: touched, then registered in one piece
    torch_bytes_per_second: float  # torch's own allocator, which rounds up to a power of two


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
    return Pinning(
        registered_bytes_per_second=nbytes / registered,
        torch_bytes_per_second=nbytes / allocated,
    )
