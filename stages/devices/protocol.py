"""What the stages need of a device: memory, copies, and events that order them."""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from layerstream.stages.memory import HostMemory

__all__ = ["Copy", "Device", "Event"]

Copy = tuple[torch.Tensor, torch.Tensor]  # (destination, source): uint8 views of equal size


class Event(Protocol):
    """A point in a stream of work."""

    def synchronize(self) -> None:
        """Block the calling thread until the work before this point is done."""


class Device(Protocol):
    """Memory, copies and events of one device. Its methods may be called from any thread."""

    @property
    def torch_device(self) -> torch.device:
        """Where computation runs."""

    @property
    def reads_host_images(self) -> bool:
        """Whether computation reads host images where they lie, so that only fused tensors are copied."""

    def model_name(self) -> str:
        """The maker's name for the device, which distinguishes it from others."""

    def free_bytes(self) -> int | None:
        """Device memory that this process may still take; None if the device uses host memory."""

    def host_memory(self, nbytes: int) -> HostMemory:
        """Host memory from which copies to this device run at full speed. The caller releases it."""

    def release_host_memory(self, memory: HostMemory) -> None:
        """Close memory from ``host_memory``."""

    def device_memory(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8 ``[nbytes]``.

        Raises:
            DeviceError: The device does not have that much free.
        """

    def drain(self) -> None:
        """Block until the device has done all its work: its memory is about to be freed."""

    def trim(self) -> None:
        """Return memory that allocators keep unused, for other consumers or because the device is being closed."""

    def copy(self, copies: Sequence[Copy], *, after: Sequence[Event]) -> Event:
        """Start ``copies`` once ``after`` has passed; the event passes when they are done."""

    def stream(self) -> Hashable:
        """The stream on which the calling thread's work is queued now. Equal for equal streams."""

    def computing_on(self, stream: Hashable) -> AbstractContextManager[object]:
        """Queue the calling thread's work on ``stream``, which ``stream()`` returned in any thread."""

    def record(self, stream: Hashable = None) -> Event:
        """An event behind the work queued on ``stream`` so far, by default the calling thread's stream."""

    def wait(self, event: Event) -> None:
        """Make work that the calling thread queues from now on wait for ``event``."""

    def passed_at(self, event: Event) -> float | None:
        """When ``event`` passed, by ``time.perf_counter``. Returns at once.

        None if it has not passed yet, or never will because the device has failed.
        """
