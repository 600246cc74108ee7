"""What torch keeps for each thread, taken from the thread that makes a request to the one that computes it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerstream.stages.devices.protocol import Device

__all__ = ["CallerContext"]


class CallerContext:
    """The stream and the autocast of the calling thread.

    Taken when the request is made: once it is admitted, those of another task may be current on the event loop.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = device.stream()  # so that computation is ordered with the caller's own work
        self._kind = device.torch_device.type
        self._casts = torch.is_autocast_enabled(self._kind)
        self._dtype = torch.get_autocast_dtype(self._kind)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the context that of the current thread."""
        with (
            self._device.computing_on(self._stream),
            torch.autocast(self._kind, dtype=self._dtype, enabled=self._casts),
        ):
            yield
