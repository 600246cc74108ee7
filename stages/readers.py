"""How bytes get from a weight file into memory: direct reads, mappings, and direct reads at a given rate."""

import ctypes
import errno
import logging
import math
import mmap
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch

from layerstream.stages.batch import Extent, LayerBatch
from layerstream.stages.errors import ReadError
from layerstream.stages.memory import Image, address_of, tensor_over

__all__ = ["BLOCK_BYTES", "DirectReader", "MmapReader", "Reader", "ThrottledReader"]

logger = logging.getLogger(__name__)

# What O_DIRECT wants offsets, lengths and addresses to be multiples of: 4096 satisfies every filesystem that
# has it, and where 512 would do, it costs a few KiB per read.
BLOCK_BYTES = 4096

# Mapped pages seldom leave memory from one second to the next; asking for 3 GB of them takes 25 ms of a core that
# computes, and handing the questions to threads as much again. Those that do leave are faulted in by computation.
_RECHECK_SECONDS = 5.0

# How filesystems say that they have no direct reads.
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)

_MADV_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap before 3.13


class Reader(Protocol):
    """Reads extents of the weight files, from several threads at once."""

    @property
    def maps_files(self) -> bool:
        """Whether computation may use the bytes where ``mapped`` has them, with no slot and no copy."""

    def read(self, extent: Extent, into: memoryview) -> None:
        """Fill the first ``extent.nbytes`` of ``into``, which is as long as the extent rounded up to blocks.

        Raises:
            ReadError: the file has not that many bytes there, or the disk reports an error.
        """

    def touch(self, extent: Extent) -> None:
        """Bring ``extent`` into memory ahead of its use through ``mapped``."""

    def touched_lately(self, extent: Extent) -> bool:
        """Whether ``touch`` would find nothing to do. Takes no time."""

    def mapped(self, batch: LayerBatch) -> Image:
        """The host image of ``batch`` in the mapping of the files.

        Raises:
            ReadError: a file is shorter than the batch needs.
        """

    def interrupt(self) -> None:
        """Let calls that only wait return at once: the pipeline is closing."""

    def close(self) -> None:
        """Close the files. No call is under way any more."""


class _Files:
    """Open descriptors, and the errors that name their files."""

    def __init__(self, paths: Sequence[Path], flags: int) -> None:
        self.paths = paths
        self._stack = ExitStack()
        self.descriptors: list[int] = []
        with ExitStack() as opened:
            for path in paths:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
                except OSError as error:
                    raise self.error(path, 0, error) from error
                opened.callback(os.close, descriptor)
                self.descriptors.append(descriptor)
            self._stack = opened.pop_all()

    @staticmethod
    def error(path: Path, offset: int, error: OSError) -> ReadError:
        return ReadError(
            f"{path}: reading at offset {offset} failed: {error.strerror or error} (errno {error.errno}); "
            "check the disk and that the file is readable"
        )

    def shrank(self, file: int, needed: int) -> ReadError:
        size = os.fstat(self.descriptors[file]).st_size
        return ReadError(
            f"{self.paths[file]}: holds {size} bytes now, but {needed} are needed: it was changed while it "
            "was streamed; restore the file and open the model again"
        )

    def close(self) -> None:
        self._stack.close()


class DirectReader:
    """O_DIRECT reads: past the page cache, in place, at next to no processor time.

    Where a filesystem refuses O_DIRECT (tmpfs, some overlay and network filesystems), reads are buffered
    and what they leave in the page cache is dropped at once; ``falls_back`` tells.
    """

    maps_files = False

    def __init__(self, paths: Sequence[Path]) -> None:
        self._buffered = _Files(paths, 0)
        try:
            self._direct: _Files | None = _Files(paths, getattr(os, "O_DIRECT", 0))
        except ReadError as error:
            if getattr(error.__cause__, "errno", None) not in _REFUSED:
                self._buffered.close()
                raise
            self._direct = None
            self._say_fallback(error)
        self.falls_back = self._direct is None or not hasattr(os, "O_DIRECT")

    def _say_fallback(self, error: BaseException) -> None:
        self.falls_back = True
        logger.warning(
            "direct reads are refused here (%s); reading through the page cache and dropping it behind",
            # Not the error itself: its frames hold the slot as long as anybody keeps the record.
            str(error),
        )

    def read(self, extent: Extent, into: memoryview) -> None:
        """Read with ``preadv``, past the page cache where the filesystem lets us."""
        try:
            if not self.falls_back and self._read_direct(extent, into):
                return
            self._read_buffered(extent, into)
        except OSError as error:
            raise _Files.error(self._buffered.paths[extent.file], extent.offset, error) from error

    def _read_direct(self, extent: Extent, into: memoryview) -> bool:
        assert self._direct is not None  # noqa: S101
        descriptor, done = self._direct.descriptors[extent.file], 0
        while done < extent.nbytes:
            try:
                got = os.preadv(descriptor, [into[done:]], extent.offset + done)
            except OSError as error:
                # Opened, but not for direct reads after all.
                if error.errno in _REFUSED and done == 0:
                    self._say_fallback(error)
                    return False
                raise
            if done + got >= extent.nbytes:
                break
            # A short read may end inside a block; the next one has to begin at a block again.
            whole = (done + got) // BLOCK_BYTES * BLOCK_BYTES
            # The file shrank, or it comes in smaller pieces; a buffered read can tell.
            if whole <= done:
                return False
            done = whole
        return True

    def _read_buffered(self, extent: Extent, into: memoryview) -> None:
        descriptor, done = self._buffered.descriptors[extent.file], 0
        while done < extent.nbytes:
            got = os.preadv(descriptor, [into[done : extent.nbytes]], extent.offset + done)
            if got == 0:
                raise self._buffered.shrank(extent.file, extent.offset + extent.nbytes)
            done += got
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)

    def touch(self, extent: Extent) -> None:
        """Not for this reader: its bytes live in slots."""
        raise AssertionError(f"{extent} has no mapping")

    def touched_lately(self, extent: Extent) -> bool:
        """Not for this reader: its bytes live in slots."""
        raise AssertionError(f"{extent} has no mapping")

    def mapped(self, batch: LayerBatch) -> Image:
        """Not for this reader: its bytes live in slots."""
        raise AssertionError(f"layer batch {batch.index} has no mapping")

    def interrupt(self) -> None:
        """Nothing to do: a read in progress is over soon."""

    def close(self) -> None:
        """Close the files."""
        self._buffered.close()
        if self._direct is not None:
            self._direct.close()


class ThrottledReader(DirectReader):
    """Direct reads at a constant rate below the disk's: repeatable comparisons, and what-if runs.

    Args:
        bytes_per_second: the rate, over all threads together.
    """

    def __init__(self, paths: Sequence[Path], bytes_per_second: float) -> None:
        super().__init__(paths)
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the imagined disk is done with all that was asked of it
        self._closing = threading.Event()

    def read(self, extent: Extent, into: memoryview) -> None:
        """Read, and return no sooner than a disk of the given rate would."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + extent.nbytes / self._rate
            due = self._free_at
        super().read(extent, into)
        self._closing.wait(max(0.0, due - time.perf_counter()))

    def interrupt(self) -> None:
        """Whoever waits for his turn returns."""
        self._closing.set()


class MmapReader:
    """Mappings of the files: with them in the page cache, as fast as weights in memory.

    A file that shrinks under its mapping would kill the process with SIGBUS at the next access. So the size
    is checked before each batch; a file that is cut between that check and the last use still kills.
    """

    maps_files = True

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = _Files(paths, 0)
        self._maps: list[mmap.mmap] = []
        try:
            for path, descriptor in zip(paths, self._files.descriptors, strict=True):
                self._maps.append(self._map(path, descriptor))
        except BaseException:
            self._files.close()
            raise
        self._addresses = [address_of(mapping) for mapping in self._maps]
        self._tensors = [tensor_over(mapping) for mapping in self._maps]
        libc = ctypes.CDLL(None, use_errno=True)
        self._madvise = libc.madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._mincore = libc.mincore
        self._mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._checked_at: dict[Extent, float] = {}
        self._images: dict[int, Image] = {}
        # Of files that are not ours, mincore says of every page that it is there, so as to tell nothing.
        self._askable = [
            path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK) for path in paths
        ]

    @staticmethod
    def _map(path: Path, descriptor: int) -> mmap.mmap:
        try:
            # Private and writable, since torch has no read-only tensors; nothing ever writes.
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise ReadError(f"{path}: cannot be mapped ({error}); restore the file") from error

    def read(self, extent: Extent, into: memoryview) -> None:
        """Copy from the mapping: for devices that want the bytes in a slot."""
        self._check(extent.file, extent.offset + extent.nbytes)
        # Tensor.copy_ releases the GIL while it faults pages in; slicing the mapping would hold it.
        source = self._tensors[extent.file].narrow(0, extent.offset, extent.nbytes)
        torch.frombuffer(into, dtype=torch.uint8, count=extent.nbytes).copy_(source)

    def touch(self, extent: Extent) -> None:
        """Fault the pages of ``extent`` in, without the GIL."""
        self._check(extent.file, extent.offset + extent.nbytes)
        address = self._addresses[extent.file] + extent.offset
        # Populating what is there already still walks it page by page: 0.18 s of processor time for 3 GB
        # in every sweep, beside 0.02 for asking whether it is there.
        if self.touched_lately(extent):
            return
        checked_at = self._checked_at.get(extent, -math.inf)
        self._checked_at[extent] = time.monotonic()
        known = checked_at > 0 and self._askable[extent.file]
        if known and self._is_resident(address, extent.nbytes):
            return
        if self._madvise(address, extent.nbytes, _MADV_POPULATE_READ) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # an older kernel: at least start the read-ahead
                self._madvise(address, extent.nbytes, mmap.MADV_WILLNEED)
                return
            raise _Files.error(
                self._files.paths[extent.file], extent.offset, OSError(code, os.strerror(code))
            )

    def touched_lately(self, extent: Extent) -> bool:
        """Whether ``extent`` was in memory a few seconds ago."""
        checked_at = self._checked_at.get(extent, -math.inf)
        return time.monotonic() - checked_at < _RECHECK_SECONDS

    def _is_resident(self, address: int, nbytes: int) -> bool:
        pages = self._pages(address, nbytes)
        return pages is not None and b"\0" not in pages

    def _pages(self, address: int, nbytes: int) -> bytes | None:
        """A byte for each page, zero where it is not in memory; None where the kernel does not say."""
        pages = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
        return pages.raw if self._mincore(address, nbytes, pages) == 0 else None

    def resident_bytes(self, extent: Extent) -> int | None:
        """How much of ``extent``, which begins on a page, is in the page cache; None where nobody may know."""
        if not self._askable[extent.file]:
            return None
        pages = self._pages(self._addresses[extent.file] + extent.offset, extent.nbytes)
        if pages is None:
            return None
        return min(extent.nbytes, (len(pages) - pages.count(0)) * mmap.PAGESIZE)

    def evict(self, extent: Extent) -> None:
        """Drop ``extent`` from the page cache, as far as nobody has it mapped in or writes to it."""
        if hasattr(os, "posix_fadvise"):
            descriptor = self._files.descriptors[extent.file]
            os.posix_fadvise(descriptor, extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)

    def mapped(self, batch: LayerBatch) -> Image:
        """Views of the mapping, one part per read."""
        for read in batch.reads:
            self._check(read.file, read.file_offset + read.nbytes)
        # A mapping stays where it is: so do the tensors over it, which take milliseconds to make.
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

    def _check(self, file: int, needed: int) -> None:
        if os.fstat(self._files.descriptors[file]).st_size < needed:
            raise self._files.shrank(file, needed)

    def interrupt(self) -> None:
        """Nothing to do: a page fault is over soon."""

    def close(self) -> None:
        """Close the files. A mapping that somebody still holds a view of goes with its last view."""
        self._images.clear()
        self._tensors.clear()
        while self._maps:
            try:
                self._maps.pop().close()
            except BufferError:
                logger.debug("a mapping stays until its last view is dropped")
        self._files.close()
