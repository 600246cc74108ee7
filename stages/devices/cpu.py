"""The host's own processor as a device."""

import platform
import time
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from layerstream.stages.devices.protocol import Copy, Event
from layerstream.stages.memory import HostMemory
from layerstream.stages.process.libraries import LibraryMemory

__all__ = ["CpuDevice"]


class _Passed:
    """An event of a device that does its work at once."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once."""


class CpuDevice:
    """The host's own processor: computation reads host images, and copies are done when they return."""

    torch_device = torch.device("cpu")
    reads_host_images = True

    def model_name(self) -> str:
        """The architecture, as the system calls it."""
        return platform.machine()

    def free_bytes(self) -> int | None:
        """None: the device uses host memory."""
        return None

    def host_memory(self, nbytes: int) -> HostMemory:
        """Memory on huge pages."""
        return HostMemory(nbytes)

    def release_host_memory(self, memory: HostMemory) -> None:
        """Close ``memory``."""
        memory.close()

    def device_memory(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory, page-aligned, freed with its last view."""
        return HostMemory(nbytes).tensor

    def drain(self) -> None:
        """Nothing to do: work is done when it returns."""

    def trim(self) -> None:
        """Return memory that the C library and MKL keep unused to the system."""
        LibraryMemory().release()

    def copy(self, copies: Sequence[Copy], *, after: Sequence[Event]) -> Event:
        """Copy now."""
        for event in after:
            event.synchronize()
        for destination, source in copies:
            destination.copy_(source)
        return _Passed()

    def stream(self) -> Hashable:
        """None: there are no queues."""
        return None

    def computing_on(self, stream: Hashable) -> AbstractContextManager[object]:  # noqa: ARG002
        """Nothing to do: work is done when it returns."""
        return nullcontext()

    def record(self, stream: Hashable = None) -> Event:  # noqa: ARG002
        """An event that has passed."""
        return _Passed()

    def wait(self, event: Event) -> None:
        """Wait for ``event``, which has passed unless it comes from another device."""
        event.synchronize()

    def passed_at(self, event: Event) -> float:
        """When ``event`` was made: work is done when it returns."""
        assert isinstance(event, _Passed)  # noqa: S101
        return event.seconds
