"""Weight files mapped into memory."""

import ctypes
import errno
import logging
import mmap
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from layerstream.stages.batch import Extent, LayerBatch
from layerstream.stages.errors import ReadError
from layerstream.stages.memory import Image, address_of, tensor_over
from layerstream.stages.readers.files import FileVersion, WeightFiles
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["MmapReader"]

logger = logging.getLogger(__name__)

# Mapped pages seldom leave memory from one second to the next, and asking the kernel about 3 GB of them takes 25 ms
# of a core that is needed for computing, and as much again to hand the calls to threads. Pages that did leave are
# faulted in by the computation.
_RECHECK_SECONDS = 5.0

_MADV_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap before 3.13


class MmapReader:
    """Maps the files: once they are in the page cache, as fast as weights in memory.

    On a CPU, computation uses the mapping itself (``fault_in``, then ``image``), with no slot and no copy. Other
    devices copy from slots, which ``read`` fills.

    A file that shrinks while it is mapped kills the process with SIGBUS at the next access. So size and time of the
    last change are checked before each batch; truncation between that check and the batch's last use still does, and so
    does an I/O error there. A page that never comes there holds up the computation: closing leaves it behind.

    Args:
        paths: The weight files.
        expected: The versions that they have to be; by default any.
        guard: Watches over the reads; stopped or closed, the reader leaves it as it is. By default one of its own.

    Raises:
        ReadError: A file cannot be opened or mapped, or is of another version.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        expected: Sequence[FileVersion] = (),
        guard: ReadGuard | None = None,
    ) -> None:
        self._guard = ReadGuard() if guard is None else guard.part()
        self._maps: list[mmap.mmap] = []
        self._tensors: list[torch.Tensor] = []
        self._faulted_in_at: dict[Extent, float] = {}
        self._images: dict[int, Image] = {}
        self._watched = ExitStack()
        with ExitStack() as undo:
            undo.callback(self._guard.close)
            self._files = WeightFiles(paths, self._guard, expected=expected)
            undo.callback(self.close)
            for path, descriptor in zip(paths, self._files.descriptors, strict=True):
                self._maps.append(self._map(path, descriptor))
            self._watched.enter_context(self._guard.mapping(paths[0]))
            self._addresses = [address_of(mapping) for mapping in self._maps]
            self._tensors += [tensor_over(mapping) for mapping in self._maps]
            # Of files that this user neither owns nor may write, mincore claims that every page is in memory.
            self._reports_residency = [
                os.fstat(descriptor).st_uid == os.geteuid() or os.access(path, os.W_OK)
                for path, descriptor in zip(paths, self._files.descriptors, strict=True)
            ]
            undo.pop_all()
        libc = ctypes.CDLL(None, use_errno=True)
        self._madvise = libc.madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._mincore = libc.mincore
        self._mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

    @staticmethod
    def _map(path: Path, descriptor: int) -> mmap.mmap:
        try:
            # Private and writable, since torch has no read-only tensors; nothing ever writes.
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise ReadError(
                    f"{path}: cannot be mapped: the address space of this process (ulimit -v) is too small; raise "
                    "that limit, or have files read directly with reader='direct'"
                ) from error
            raise ReadError(f"{path}: cannot be mapped ({error}); restore the file") from error

    def read(self, extent: Extent, into: memoryview) -> None:
        """Copy ``extent`` from the mapping."""
        path = self._files.paths[extent.file]
        with self._files.in_use(extent.file), self._guard.watching(path, extent.offset):
            self._check(extent.file, extent.offset + extent.nbytes)
            # Tensor.copy_ releases the GIL while it faults pages in; slicing the mapping would hold it.
            source = self._tensors[extent.file].narrow(0, extent.offset, extent.nbytes)
            torch.frombuffer(into, dtype=torch.uint8, count=extent.nbytes).copy_(source)

    def fault_in(self, extent: Extent) -> None:
        """Fault the pages of ``extent`` in ahead of their use, without the GIL.

        Raises:
            ReadError: The file is too short, or the disk reports an error.
        """
        with self._files.in_use(extent.file):
            self._fault_in(extent)

    def _fault_in(self, extent: Extent) -> None:
        self._check(extent.file, extent.offset + extent.nbytes)
        if self.faulted_in_recently(extent):
            return
        first = extent not in self._faulted_in_at
        self._faulted_in_at[extent] = time.monotonic()
        # Populating walks even pages that are in memory one by one: 0.18 s of processor time for 3 GB in every
        # sweep. Asking the kernel first takes 0.02 s.
        if not first and self.resident_bytes(extent) == extent.nbytes:
            return
        path = self._files.paths[extent.file]
        mapped = self._tensors[extent.file]  # while this refers to it, it stays mapped
        try:
            self._guard.run(partial(self._populate, extent), path=path, offset=extent.offset)
        except OSError as error:
            raise WeightFiles.error(path, extent.offset, error) from error
        finally:
            del mapped

    def _populate(self, extent: Extent) -> None:
        address = self._addresses[extent.file] + extent.offset
        if self._madvise(address, extent.nbytes, _MADV_POPULATE_READ) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # an older kernel: at least start the read-ahead
                self._madvise(address, extent.nbytes, mmap.MADV_WILLNEED)
                return
            # What would be a SIGBUS is EFAULT here: of a file that is long enough, an error of its disk.
            code = errno.EIO if code == errno.EFAULT else code
            raise OSError(code, os.strerror(code))

    def faulted_in_recently(self, extent: Extent) -> bool:
        """Whether ``extent`` was in memory a few seconds ago, so that ``fault_in`` has nothing to do."""
        faulted_in_at = self._faulted_in_at.get(extent)
        return faulted_in_at is not None and time.monotonic() - faulted_in_at < _RECHECK_SECONDS

    def image(self, batch: LayerBatch) -> Image:
        """The host image of ``batch``: views of the mapping, one part per read.

        Raises:
            ReadError: A file is shorter than the batch needs.
        """
        for read in batch.reads:
            self._check(read.file, read.file_offset + read.nbytes)
        # The mapping never moves, so the tensors over it, which take milliseconds to make, are kept.
        if batch.index not in self._images:
            self._images[batch.index] = Image(
                [
                    (
                        read.host_offset,
                        self._tensors[read.file].narrow(0, read.file_offset, read.nbytes),
                    )
                    for read in batch.reads
                ]
            )
        return self._images[batch.index]

    def resident_bytes(self, extent: Extent) -> int | None:
        """How much of ``extent``, which begins on a page, is in the page cache; None if the kernel does not say."""
        if not self._reports_residency[extent.file]:
            return None
        # A byte for each page, zero where it is not in memory.
        pages = ctypes.create_string_buffer(-(-extent.nbytes // mmap.PAGESIZE))
        address = self._addresses[extent.file] + extent.offset
        if self._mincore(address, extent.nbytes, pages) != 0:
            return None
        present = len(pages) - pages.raw.count(0)
        return min(extent.nbytes, present * mmap.PAGESIZE)

    def evict(self, extent: Extent) -> None:
        """Drop ``extent`` from the page cache, except pages that are mapped elsewhere or being written."""
        if hasattr(os, "posix_fadvise"):
            descriptor = self._files.descriptors[extent.file]
            os.posix_fadvise(descriptor, extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)

    def _check(self, file: int, needed: int) -> None:
        if self._files.status(file).st_size < needed:
            raise self._files.shrank(file, needed)
        self._files.refuse_change(file)

    def interrupt(self) -> None:
        """Repeat nothing that fails; a page fault ends soon."""
        self._guard.stop()

    def close(self) -> None:
        """Close the files. A mapping stays until its last view is dropped."""
        self._images.clear()
        self._tensors.clear()
        while self._maps:
            try:
                self._maps.pop().close()
            except BufferError:
                logger.debug("a mapping stays until its last view is dropped")
        self._files.close()
        self._watched.close()
        self._guard.close()
