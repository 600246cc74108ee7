"""A lower bound: how fast a GPU copies from host memory, and how long page-locking takes.

It uses torch alone, not the library's own device, whose faults it would share. A rehearsal without a GPU copies within
host memory.
"""

import time
from dataclasses import dataclass

import torch

from layerstream.stages.devices.lookup import open_device
from layerstream.stages.memory import HostMemory
from layerstream.stages.process.headroom import host_available_bytes
from layerstream.tools.benchmarks.accelerator import Accelerator

__all__ = ["PageLocking", "claim_host_memory", "measure_copy_rate", "measure_page_locking"]

# Bytes copied per measurement and block size: at 50 GB/s some 80 ms, long compared with a timer and a launch.
_COPIED_BYTES = 4 << 30
# ``claim_host_memory`` allocates in steps, and leaves some memory free. A machine whose free memory does not grow for
# some seconds has no more.
_STEP_BYTES = 1 << 30
_KEPT_FREE_BYTES = 2 << 30
_GROWTH_SECONDS = 5.0


def measure_copy_rate(
    accelerator: Accelerator, *, block_bytes: int, pinned: bool, total_bytes: int = _COPIED_BYTES
) -> float:
    """Measure bytes per second of copies of ``block_bytes`` to the device, in sequence on one stream."""
    page_locked = pinned and accelerator.is_gpu
    # Enough blocks to exceed the processor's caches.
    blocks = max(2, min(total_bytes, 1 << 30) // block_bytes)
    source = torch.empty(blocks * block_bytes, dtype=torch.uint8, pin_memory=page_locked).fill_(1)
    target = torch.empty(block_bytes, dtype=torch.uint8, device=accelerator.device)
    count = max(blocks, total_bytes // block_bytes)

    def copy_blocks() -> None:
        for number in range(count):
            start = number % blocks * block_bytes
            target.copy_(source[start : start + block_bytes], non_blocking=page_locked)

    accelerator.seconds(lambda: target.copy_(source[:block_bytes]))
    return count * block_bytes / accelerator.seconds(copy_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLocking:
    """How fast host memory is page-locked."""

    registered_bytes_per_second: float
    """As the library does: pages are written, then registered in one piece."""
    torch_bytes_per_second: float
    """With torch's allocator, which rounds up to a power of two."""


def measure_page_locking(accelerator: Accelerator, *, nbytes: int) -> PageLocking:
    """Measure how fast ``nbytes`` of host memory are allocated and page-locked."""
    device = open_device(str(accelerator.device))
    began = time.perf_counter()
    memory = device.host_memory(nbytes)
    registered_seconds = time.perf_counter() - began
    device.release_host_memory(memory)
    began = time.perf_counter()
    tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=accelerator.is_gpu)
    torch_seconds = time.perf_counter() - began
    del tensor
    _empty_host_cache()
    return PageLocking(
        registered_bytes_per_second=nbytes / registered_seconds,
        torch_bytes_per_second=nbytes / torch_seconds,
    )


def claim_host_memory(nbytes: int) -> None:
    """Allocate host memory until ``nbytes`` are available, and free it.

    Some virtual machines start with little RAM and get more as it is used, so that the memory free at first is
    misleading. Others either have enough from the start, or never get more.
    """
    claimed: list[HostMemory] = []
    deadline = time.monotonic() + _GROWTH_SECONDS
    try:
        while (free := host_available_bytes()) + len(claimed) * _STEP_BYTES < nbytes:
            if free > _STEP_BYTES + _KEPT_FREE_BYTES:
                claimed.append(HostMemory(_STEP_BYTES))
                claimed[-1].tensor.zero_()
                deadline = time.monotonic() + _GROWTH_SECONDS
            elif time.monotonic() > deadline:
                return
            else:
                time.sleep(0.1)
    finally:
        for memory in claimed:
            memory.close()


def _empty_host_cache() -> None:
    """Free the page-locked memory that torch's allocator would keep for ever."""
    empty = getattr(torch._C, "_host_emptyCache", None)  # noqa: SLF001 - torch has no public name for it
    if empty is not None and torch.cuda.is_available():
        empty()
