"""Host memory for slots and residents, and images: tensors as views of bytes that have arrived."""

import ctypes
import logging
import mmap
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from layerstream.stages.batch import TensorView
from layerstream.stages.errors import DeviceError

__all__ = [
    "HUGE_PAGE_BYTES",
    "HostMemory",
    "Image",
    "address_of",
    "round_up",
    "strides_of",
    "tensor_over",
]

logger = logging.getLogger(__name__)

# O_DIRECT pins the destination page by page: into 4 KiB pages it ran at half the speed that it has into 2 MiB
# pages, whatever the number of threads and the block size.
HUGE_PAGE_BYTES = 2 << 20


def round_up(nbytes: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``nbytes``."""
    return -(-nbytes // multiple) * multiple


def address_of(buffer: mmap.mmap) -> int:
    """The address at which ``buffer`` is mapped."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def tensor_over(buffer: mmap.mmap) -> torch.Tensor:
    """The bytes of ``buffer``, as a uint8 tensor whose views keep it from being unmapped.

    torch keeps a reference to the buffer that it is given, but exports no lock on it: given the map itself, closing
    the map would unmap the memory under the tensor, and its next use would kill the process. A memoryview
    in between is such a lock: the map refuses to be closed.
    """
    return torch.frombuffer(memoryview(buffer), dtype=torch.uint8)


class HostMemory:
    """Anonymous private memory on huge pages, as the destination of reads.

    Private, because shared anonymous memory gets 4 KiB pages; not inherited by forked children, because a
    copy-on-write fault during a direct read would send the bytes to the wrong process.

    Attributes:
        tensor: All of the memory, uint8 ``[nbytes]``, page-aligned.

    Raises:
        DeviceError: The system does not have that much.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        # Huge pages begin at multiples of their size, so map more; pages that are never written take no memory.
        huge_bytes = nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        size = nbytes + HUGE_PAGE_BYTES if huge_bytes else max(nbytes, mmap.PAGESIZE)
        try:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise DeviceError(
                f"the system refused {nbytes} bytes of host memory ({error}); lower the host budget or free memory"
            ) from error
        skipped_bytes = -address_of(self._map) % HUGE_PAGE_BYTES if huge_bytes else 0
        self.address = address_of(self._map) + skipped_bytes
        if huge_bytes:
            # Only whole huge pages: of the last one, all would be allocated though only a part is used.
            self._advise("MADV_HUGEPAGE", skipped_bytes, huge_bytes)
        self._advise("MADV_DONTFORK", 0, size)
        self.tensor = tensor_over(self._map)[skipped_bytes : skipped_bytes + nbytes]

    def _advise(self, name: str, start: int, nbytes: int) -> None:
        # Only on Linux, and an optimisation.
        if hasattr(mmap, name):
            try:
                self._map.madvise(getattr(mmap, name), start, nbytes)
            except OSError as error:
                logger.debug("madvise(%s) refused: %s", name, error)

    def close(self) -> None:
        """Free the memory; if there are views of it, with the last of them."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        try:
            self._map.close()
        except BufferError:
            logger.debug(
                "%d bytes of host memory stay until their last view is dropped", self.nbytes
            )


class Image:
    """The bytes of a layer batch in memory, and the tensors in them.

    Args:
        parts: Pairs of (offset in the image, uint8 tensor), by offset. A slot is one part; a mapping of the
            files is one part per read.
    """

    def __init__(self, parts: Sequence[tuple[int, torch.Tensor]]) -> None:
        self._starts = [start for start, _ in parts]
        self._parts = [part for _, part in parts]
        self._tensors: Mapping[str, torch.Tensor] = {}

    @property
    def memory(self) -> torch.Tensor:
        """All bytes of an image that is one part."""
        (part,) = self._parts
        return part

    def bytes(self, offset: int, nbytes: int) -> torch.Tensor:
        """The uint8 view ``[nbytes]`` at ``offset``, which must lie inside one part."""
        index = bisect_right(self._starts, offset) - 1
        return self._parts[index].narrow(0, offset - self._starts[index], nbytes)

    def tensors(self, views: Sequence[TensorView]) -> Mapping[str, torch.Tensor]:
        """All tensors of this image by name, as views of its bytes; made once."""
        if not self._tensors:
            self._tensors = MappingProxyType({view.name: self._tensor(view) for view in views})
        return self._tensors

    def _tensor(self, view: TensorView) -> torch.Tensor:
        dtype = getattr(torch, view.dtype)
        if view.nbytes == 0:
            return torch.empty(view.shape, dtype=dtype, device=self._device)
        index = bisect_right(self._starts, view.offset) - 1
        part = self._parts[index]
        start = part.storage_offset() + view.offset - self._starts[index]
        # One operation instead of slice, view and view again: a batch may hold hundreds of tensors.
        return torch.empty(0, dtype=dtype, device=part.device).set_(
            part.untyped_storage(), start // dtype.itemsize, view.shape, strides_of(view.shape)
        )

    @property
    def _device(self) -> torch.device:
        return self._parts[0].device if self._parts else torch.device("cpu")


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of ``shape``, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
