"""Layer batches that stay: in host RAM, in device memory, or both."""

import asyncio
from collections.abc import Iterable

import torch

from layerstream.stages.batch import LayerBatch
from layerstream.stages.devices import Device
from layerstream.stages.memory import HostMemory, Image

__all__ = ["Residents"]


class Residents:
    """The memory of all residents, allocated once, filled by the first sweep that passes each of them."""

    def __init__(self, batches: Iterable[LayerBatch], device: Device) -> None:
        self._device = device
        self._host_at: dict[int, int] = {}
        self._device_at: dict[int, int] = {}
        host_bytes = device_bytes = 0
        for batch in batches:
            if batch.host_resident:
                self._host_at[batch.index] = host_bytes
                host_bytes += batch.host_bytes
            if batch.device_resident:
                self._device_at[batch.index] = device_bytes
                device_bytes += batch.device_bytes
        self._host: HostMemory | None = device.host_memory(host_bytes) if self._host_at else None
        self._on_device: torch.Tensor | None = None
        try:
            if self._device_at:
                self._on_device = device.device_memory(device_bytes)
        except BaseException:
            self.close()
            raise
        self._loaded: set[int] = set()
        self._loading: set[int] = set()
        self._changed = asyncio.Event()

    async def loaded(self, batch: LayerBatch) -> bool:
        """Whether ``batch`` is a resident that has arrived, so that nothing needs to be read for it.

        If it is on its way, this waits to see whether it gets there: with few batches the next sweep's
        prefetch meets a resident that this sweep is still loading. On False, the caller loads it.
        """
        while batch.index in self._loading:
            self._changed.clear()
            await self._changed.wait()
        if batch.index in self._loaded or batch.streamed:
            return batch.index in self._loaded
        self._loading.add(batch.index)
        return False

    def arrived(self, batch: LayerBatch) -> None:
        """``batch`` has arrived in all images that it keeps."""
        self._loaded.add(batch.index)
        self.gave_up(batch)

    def gave_up(self, batch: LayerBatch) -> None:
        """``batch`` is not being loaded any more, arrived or not."""
        self._loading.discard(batch.index)
        self._changed.set()

    def host_bytes(self, batch: LayerBatch) -> torch.Tensor:
        """Where the host image of a host resident lives, uint8 ``[host_bytes]``."""
        assert self._host is not None  # noqa: S101
        return self._host.tensor.narrow(0, self._host_at[batch.index], batch.host_bytes)

    def device_bytes(self, batch: LayerBatch) -> torch.Tensor:
        """Where the device image of a device resident lives, uint8 ``[device_bytes]``."""
        assert self._on_device is not None  # noqa: S101
        return self._on_device.narrow(0, self._device_at[batch.index], batch.device_bytes)

    def host_image(self, batch: LayerBatch) -> Image | None:
        """The host image of ``batch``, if it is kept."""
        return Image([(0, self.host_bytes(batch))]) if batch.host_resident else None

    def device_image(self, batch: LayerBatch) -> Image | None:
        """The device image of ``batch``, if it is kept."""
        return Image([(0, self.device_bytes(batch))]) if batch.device_resident else None

    def close(self) -> None:
        """Give the memory back."""
        self._loaded = set()
        self._on_device = None
        if self._host is not None:
            self._device.release_host_memory(self._host)
            self._host = None
