"""Buffers that each request has of its own, without a copy of what it does not write to."""

import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from layerstream.stages.errors import DeviceError

__all__ = ["OwnBuffers", "is_small", "written_bytes"]

# Smaller buffers are copied for each request: a mapping has pages of 4 KiB.
_MOST_COPIED_BYTES = 1 << 16
_PAGE_BYTES = 4096


def is_small(buffer: torch.Tensor) -> bool:
    """Whether a copy of ``buffer`` is next to nothing."""
    return buffer.nbytes <= _MOST_COPIED_BYTES


def written_bytes(root: nn.Module, written: Collection[str]) -> int:
    """What the larger ones of the buffers with these paths take."""
    storages = {}
    for path, _, _, buffer in _large_buffers(root):
        if path in written:
            storage = buffer.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class OwnBuffers:
    """The larger buffers of one module tree that do not stream: masks, tables, and the state of some models.

    Most are never written to, so that copies for each request would only take memory; but which ones are may depend on
    the values in a request. So on a CPU they lie in a file in memory. Each clone of the module tree has a private mapping
    of it: the kernel copies the pages that the clone writes to, and no others. GPUs have no such mappings: there, each
    request gets copies of the buffers that the trace has shown to be written to, and shares the others.

    Args:
        root: The module tree. Its own buffers become a private mapping, too.
        written: The paths of the buffers that are written to, by the trace.
    """

    def __init__(self, root: nn.Module, written: Collection[str] = ()) -> None:
        self._file: int | None = None
        self._size = 0
        # The tree's own buffers in the file, by their ids: each with its version, which counts writes.
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}
        self._shared: dict[int, torch.Tensor] = {}
        large = list(_large_buffers(root))
        self._shared = {
            id(buffer): buffer
            for path, _, _, buffer in large
            if buffer.device.type != "cpu" and path not in written
        }
        on_cpu = [each for each in large if each[3].device.type == "cpu"]
        if on_cpu:
            try:
                self._move_to_file(on_cpu)
            except (OSError, RuntimeError) as error:
                self.close()
                raise DeviceError(
                    f"the system refuses memory for the model's buffers ({error}); free some memory"
                ) from error

    def _move_to_file(self, large: list[tuple[str, dict[str, Any], str, torch.Tensor]]) -> None:
        """Copy buffers into a file in memory, and put a private mapping of it in their place."""
        offsets: dict[int, int] = {}
        storages = []
        for *_, buffer in large:
            storage = buffer.untyped_storage()
            if storage.data_ptr() not in offsets:
                offsets[storage.data_ptr()] = self._size
                storages.append(storage)
                self._size += -(-storage.nbytes() // _PAGE_BYTES) * _PAGE_BYTES
        self._file = os.memfd_create("layerstream-buffers")
        os.ftruncate(self._file, self._size)
        written = self._mapping(shared=True)
        for storage in storages:
            source = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
            written[offsets[storage.data_ptr()] :][: len(source)] = source
        mapping = self._mapping()
        mapped: dict[int, torch.Tensor] = {}  # a buffer of several modules stays one
        for _, table, name, buffer in large:
            offset = offsets[buffer.untyped_storage().data_ptr()]
            if id(buffer) not in mapped:
                place = offset // buffer.itemsize + buffer.storage_offset()
                mapped[id(buffer)] = own = _at(mapping, place, buffer)
                self._versions[id(own)] = own, own._version  # noqa: SLF001 - autograd's own
            table[name] = mapped[id(buffer)]

    def of_clone(self, buffers: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
        """What a new clone has in place of ``buffers``, which the tree has now; by the ids of those."""
        mapping = None
        clones = {}
        for buffer in buffers:
            _, version = self._versions.get(id(buffer), (None, None))
            # One that was changed or replaced since, by a user or by a call without a request, is not that in the file.
            if version is not None and version == buffer._version:  # noqa: SLF001 - autograd's own
                mapping = self._mapping() if mapping is None else mapping
                clones[id(buffer)] = _at(mapping, buffer.storage_offset(), buffer)
            elif id(buffer) not in self._shared:
                clones[id(buffer)] = buffer.clone()
        return clones

    def _mapping(self, *, shared: bool = False) -> torch.Tensor:
        """All bytes of the file; unless ``shared``, what is written to them is seen nowhere else."""
        with torch.inference_mode(mode=False):
            return torch.from_file(
                f"/proc/self/fd/{self._file}",
                shared=shared,
                size=self._size,
                dtype=torch.uint8,
                device="cpu",
            )

    def close(self) -> None:
        """Close the file. Mappings stay."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _at(mapping: torch.Tensor, place: int, buffer: torch.Tensor) -> torch.Tensor:
    """A tensor like ``buffer`` whose memory begins ``place`` elements behind the beginning of ``mapping``."""
    with torch.inference_mode(mode=False):
        own = torch.empty(0, dtype=buffer.dtype, device="cpu")
        return own.set_(mapping.untyped_storage(), place, buffer.shape, buffer.stride())


def _large_buffers(root: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
    """The path, table, name and value of each larger buffer that does not stream."""
    for path, module in root.named_modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if type(buffer) is torch.Tensor and not buffer.is_meta and not is_small(buffer):
                yield f"{path}.{name}" if path else name, module._buffers, name, buffer  # noqa: SLF001
