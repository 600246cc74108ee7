"""What the stages ask of a device: memory, copies, and events with which they tell one another what has been done."""

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
        """What the device is called by its maker, to tell it from others."""

    def free_bytes(self) -> int | None:
        """Device memory that this process may still take; None where that is the host's."""

    def host_memory(self, nbytes: int) -> HostMemory:
        """Host memory that copies to this device run at full speed from. The caller closes it."""

    def release_host_memory(self, memory: HostMemory) -> None:
        """Close memory that ``host_memory`` gave."""

    def device_memory(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8 ``[nbytes]``.

        Raises:
            DeviceError: The device has not that much free.
        """

    def drain(self) -> None:
        """Block until the device has done all that it was given: its memory is about to be freed."""

    def trim(self) -> None:
        """Give back what allocators keep and nobody uses: other things are about to need it, or nothing is."""

    def copy(self, copies: Sequence[Copy], *, after: Sequence[Event]) -> Event:
        """Start ``copies`` once ``after`` has passed; the event passes when they are done."""

    def stream(self) -> Hashable:
        """What the calling thread's work on the device is queued on now. Equal for equal streams."""

    def computing_on(self, stream: Hashable) -> AbstractContextManager[object]:
        """Queue the calling thread's work on ``stream``, which ``stream()`` gave in any thread."""

    def record(self, stream: Hashable = None) -> Event:
        """The work queued on ``stream`` so far; by default on the calling thread's own."""

    def wait(self, event: Event) -> None:
        """Let the work that the calling thread gives to the device from now on wait for ``event``."""

    def passed_at(self, event: Event) -> float | None:
        """When ``event`` passed, by ``time.perf_counter``. Returns at once.

        None: it has not passed yet, or the device has failed, and it never will.
        """
