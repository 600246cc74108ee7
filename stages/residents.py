"""Layer batches that stay: in host RAM, in device memory, or both."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from layerstream.stages.batch import LayerBatch
from layerstream.stages.devices import Device
from layerstream.stages.memory import HostMemory, Image

__all__ = ["Residents"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Home:
    """Where one resident lives."""

    host: HostMemory | None
    device: torch.Tensor | None


class Residents:
    """The memory of residents, filled by the first sweep that passes each of them.

    Each has memory of its own, so that it can be given back by itself.
    """

    def __init__(self, batches: Iterable[LayerBatch], device: Device) -> None:
        self._device = device
        self._homes: dict[int, _Home] = {}
        self._loaded: set[int] = set()
        self._loading: dict[int, LayerBatch] = {}  # as it was when that began
        self._changed = asyncio.Event()
        self.add(batches)

    @property
    def complete(self) -> bool:
        """Whether all of them have arrived."""
        return self._homes.keys() <= self._loaded

    def add(self, batches: Iterable[LayerBatch]) -> None:
        """Take memory for those of ``batches`` that stay and have none yet: for all of them, or for none.

        Raises:
            DeviceError: there is not that much.
        """
        added = []
        try:
            for batch in batches:
                if not batch.streamed and batch.index not in self._homes:
                    added.append(batch.index)
                    self._take(batch)
        except BaseException:
            self.remove(added)
            raise

    def _take(self, batch: LayerBatch) -> None:
        host = self._device.host_memory(batch.host_bytes) if batch.host_resident else None
        try:
            device = (
                self._device.device_memory(batch.device_bytes) if batch.device_resident else None
            )
        except BaseException:
            if host is not None:
                self._device.release_host_memory(host)
            raise
        self._homes[batch.index] = _Home(host=host, device=device)

    def remove(self, indices: Iterable[int]) -> None:
        """Give back the memory of these; nothing reads or writes it any more."""
        for index in indices:
            home = self._homes.pop(index, None)
            self._loaded.discard(index)
            self._loading.pop(index, None)
            if home is not None and home.host is not None:
                self._device.release_host_memory(home.host)

    def superseded(self, batches: Iterable[LayerBatch]) -> list[int]:
        """Indices of those that have memory, but not for the images that ``batches`` have stay."""
        return [
            batch.index
            for batch in batches
            if (home := self._homes.get(batch.index)) is not None
            and (home.host is not None, home.device is not None)
            != (batch.host_resident, batch.device_resident)
        ]

    async def loaded(self, batch: LayerBatch) -> bool:
        """Whether ``batch`` is a resident that has arrived, so that nothing needs to be read for it.

        If it is on its way, this waits to see whether it gets there: with few batches the next sweep's
        prefetch meets a resident that this sweep is still loading. On False, the caller loads it.
        """
        if batch.streamed:  # also if it has just ceased to stay
            return False
        while batch.index in self._loading:
            self._changed.clear()
            await self._changed.wait()
        if batch.index in self._loaded:
            return True
        self._loading[batch.index] = batch
        return False

    def arrived(self, batch: LayerBatch) -> None:
        """``batch`` has arrived in all images that it keeps."""
        # News of a copy into memory that was given back meanwhile must not pass for the next one's.
        if self._loading.get(batch.index) is batch:
            self._loaded.add(batch.index)
        self.gave_up(batch)

    def gave_up(self, batch: LayerBatch) -> None:
        """``batch`` is not being loaded any more, arrived or not."""
        if self._loading.get(batch.index) is batch:
            del self._loading[batch.index]
        self._changed.set()

    def host_bytes(self, batch: LayerBatch) -> torch.Tensor:
        """Where the host image of a host resident lives, uint8 ``[host_bytes]``."""
        host = self._homes[batch.index].host
        assert host is not None  # noqa: S101
        return host.tensor

    def device_bytes(self, batch: LayerBatch) -> torch.Tensor:
        """Where the device image of a device resident lives, uint8 ``[device_bytes]``."""
        device = self._homes[batch.index].device
        assert device is not None  # noqa: S101
        return device

    def host_image(self, batch: LayerBatch) -> Image | None:
        """The host image of ``batch``, if it is kept."""
        return Image([(0, self.host_bytes(batch))]) if batch.host_resident else None

    def device_image(self, batch: LayerBatch) -> Image | None:
        """The device image of ``batch``, if it is kept."""
        return Image([(0, self.device_bytes(batch))]) if batch.device_resident else None

    def close(self) -> None:
        """Give all memory back."""
        self.remove(list(self._homes))
