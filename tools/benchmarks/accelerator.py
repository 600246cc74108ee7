"""The GPU that is measured: waiting for it, timing its work, and watching its memory."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Accelerator", "PeakMemory"]

# The driver keeps no peak of its own, so it is polled: often enough for rings and residents, which are allocated for
# long, and seldom enough not to disturb what is measured.
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Peak of a device's memory, above what was allocated before."""

    allocated_bytes: int
    """By torch's counter: memory of tensors."""
    driver_bytes: int
    """By the driver's counter: including what torch's allocator keeps, and loaded kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """The GPU that is measured; in a rehearsal the CPU."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU, and no rehearsal."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def describe(self) -> dict[str, Any]:
        """The device's name, memory and versions."""
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
    def watched(self) -> Iterator[Callable[[], PeakMemory]]:
        """Watch the device's memory while the block runs; yields a function that returns the peak so far."""
        if not self.is_gpu:
            yield lambda: PeakMemory(allocated_bytes=0, driver_bytes=0)
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        allocated_before = torch.cuda.memory_allocated(self.device)
        free_before = least_free = torch.cuda.mem_get_info(self.device)[0]
        ended = threading.Event()

        def watch() -> None:
            nonlocal least_free
            while not ended.wait(_POLL_SECONDS):
                least_free = min(least_free, torch.cuda.mem_get_info(self.device)[0])

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield lambda: PeakMemory(
                allocated_bytes=torch.cuda.max_memory_allocated(self.device) - allocated_before,
                driver_bytes=free_before - least_free,
            )
        finally:
            ended.set()
            watcher.join()

    def seconds(self, work: Callable[[], object]) -> float:
        """Time ``work``, including the work that it starts on the device."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began
