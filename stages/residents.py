"""The memory of layer batches that stay: in host RAM, in device memory, or both."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from layerstream.stages.batch import LayerBatch, Residence
from layerstream.stages.devices.protocol import Device
from layerstream.stages.memory import HostMemory, Image

__all__ = ["Residents"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Memory:
    """The memory of one resident: of its host image, its device image, or both.

    The images are kept with it: making the tensors in them anew takes milliseconds, in every sweep.
    """

    residence: Residence
    host: HostMemory | None
    host_image: Image | None
    device_image: Image | None


class Residents:
    """The memory of residents, filled by the first sweep that visits them.

    Each has its own allocation, which can be freed by itself.
    """

    def __init__(self, batches: Iterable[LayerBatch], device: Device) -> None:
        self._device = device
        self._memory: dict[int, _Memory] = {}
        self._loaded: set[int] = set()
        self._loading: dict[int, LayerBatch] = {}  # by index, as planned when loading began
        self._changed = asyncio.Event()
        self.add(batches)

    @property
    def complete(self) -> bool:
        """Whether all of them are loaded."""
        return self._memory.keys() <= self._loaded

    def add(self, batches: Iterable[LayerBatch]) -> None:
        """Allocate memory for the residents among ``batches`` that have none yet: for all of them or for none.

        Raises:
            DeviceError: There is not enough.
        """
        new = [b for b in batches if not b.streamed and b.index not in self._memory]
        if new:
            # They may replace a prompt's activations, which allocators keep when they are freed: on a CPU, half of
            # what a prompt of 1024 tokens took stayed in the heap in addition to the new residents.
            self._device.trim()
        added = []
        try:
            for batch in new:
                added.append(batch.index)
                self._allocate(batch)
        except BaseException:
            self.remove(added)
            raise

    def _allocate(self, batch: LayerBatch) -> None:
        host = self._device.host_memory(batch.host_bytes) if batch.host_resident else None
        try:
            device = (
                self._device.device_memory(batch.device_bytes) if batch.device_resident else None
            )
        except BaseException:
            if host is not None:
                self._device.release_host_memory(host)
            raise
        self._memory[batch.index] = _Memory(
            residence=batch.residence,
            host=host,
            host_image=None if host is None else Image([(0, host.tensor)]),
            device_image=None if device is None else Image([(0, device)]),
        )

    def remove(self, indices: Iterable[int]) -> None:
        """Free the memory of these batches, which must not be read or written any more."""
        for index in indices:
            memory = self._memory.pop(index, None)
            self._loaded.discard(index)
            self._loading.pop(index, None)
            host = memory.host if memory is not None else None
            del memory  # with the tensors in its images
            if host is not None:
                self._device.release_host_memory(host)

    def superseded(self, batches: Iterable[LayerBatch]) -> list[int]:
        """Indices of those that have memory, but not for the images that are resident in ``batches``."""
        return [
            batch.index
            for batch in batches
            if (memory := self._memory.get(batch.index)) is not None
            and memory.residence is not batch.residence
        ]

    async def loaded(self, batch: LayerBatch) -> bool:
        """Whether ``batch`` is a resident that is loaded already. After False, the caller must load it.

        If it is being loaded, this waits for the outcome: with few batches, the prefetch of the next sweep gets
        to a resident that this sweep is still loading.
        """
        if batch.streamed:  # even if its memory has not been freed yet
            return False
        while batch.index in self._loading:
            self._changed.clear()
            await self._changed.wait()
        if batch.index in self._loaded:
            return True
        self._loading[batch.index] = batch
        return False

    def arrived(self, batch: LayerBatch) -> None:
        """Mark ``batch`` as loaded, in all images that are resident."""
        # A late report of a copy into memory that was freed meanwhile must not count for its successor.
        if self._loading.get(batch.index) is batch:
            self._loaded.add(batch.index)
        self.loading_ended(batch)

    def loading_ended(self, batch: LayerBatch) -> None:
        """Mark ``batch`` as no longer being loaded, whether it arrived or not."""
        if self._loading.get(batch.index) is batch:
            del self._loading[batch.index]
        self._changed.set()

    def host_image(self, batch: LayerBatch) -> Image | None:
        """The host image of ``batch``, if it is resident: the same one in each sweep, with its tensors."""
        return self._memory[batch.index].host_image if batch.host_resident else None

    def device_image(self, batch: LayerBatch) -> Image | None:
        """The device image of ``batch``, if it is resident: the same one in each sweep, with its tensors."""
        return self._memory[batch.index].device_image if batch.device_resident else None

    def close(self) -> None:
        """Free all memory."""
        self.remove(list(self._memory))
