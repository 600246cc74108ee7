"""Direct reads: from the disk into slots, past the page cache."""

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from layerstream.stages.batch import Extent
from layerstream.stages.errors import ClosedError, ReadError
from layerstream.stages.readers.files import FileVersion, WeightFiles
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["BLOCK_BYTES", "DirectReader"]

logger = logging.getLogger(__name__)

# O_DIRECT needs offsets, lengths and addresses aligned. 4096 satisfies every filesystem that has it, and where
# 512 would do, it costs a few KiB per read.
BLOCK_BYTES = 4096

# The errors by which filesystems refuse O_DIRECT.
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectReader:
    """O_DIRECT reads: past the page cache, straight into the slot, at almost no processor time.

    Where a filesystem refuses O_DIRECT (tmpfs, some overlay and network filesystems), reads of its files are buffered and
    the pages that they leave in the page cache are dropped at once.

    Args:
        paths: The weight files.
        expected: The versions that they have to be; by default any.
        guard: Watches over the reads; stopped or closed, the reader leaves it as it is. By default one of its own.

    Raises:
        ReadError: A file cannot be opened, or is of another version.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        expected: Sequence[FileVersion] = (),
        guard: ReadGuard | None = None,
    ) -> None:
        self._guard = ReadGuard() if guard is None else guard.part()
        # For each file; None if it is among those whose filesystem refuses direct reads.
        self._direct: list[WeightFiles | None] = [None] * len(paths)
        self._refused = set() if hasattr(os, "O_DIRECT") else {*range(len(paths))}
        with ExitStack() as undo:
            undo.callback(self._guard.close)
            self._buffered = WeightFiles(paths, self._guard, expected=expected)
            undo.callback(self.close)
            for file in {*range(len(paths))} - self._refused:
                self._open_directly(file, expected[file : file + 1])
            undo.pop_all()

    def _open_directly(self, file: int, expected: Sequence[FileVersion]) -> None:
        path = self._buffered.paths[file]
        try:
            self._direct[file] = WeightFiles(
                [path], self._guard, flags=os.O_DIRECT, expected=expected
            )
        except ReadError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _REFUSED:
                raise
            self.fall_back(file, cause)

    @property
    def falls_back(self) -> bool:
        """Whether reads of some file are buffered."""
        return bool(self._refused)

    def fall_back(self, file: int, why: OSError) -> None:
        """From here on, have reads of ``file`` buffered."""
        first = not self._refused
        self._refused.add(file)
        direct, self._direct[file] = self._direct[file], None
        if direct is not None:
            direct.close()
        logger.log(
            logging.WARNING if first else logging.DEBUG,
            "%s: direct reads are refused here (%s); reading through the page cache and dropping it behind",
            self._buffered.paths[file],
            # Not the error itself: its frames would keep the slot alive as long as the log record.
            why.strerror,
        )

    def read(self, extent: Extent, into: memoryview) -> None:
        """Read with ``preadv``, directly where the filesystem allows it."""
        with self._buffered.in_use(extent.file):
            direct = self._direct[extent.file]
            if direct is None or not self._read_direct(direct, extent, into):
                self._read_buffered(extent, into)
            self._buffered.refuse_change(extent.file)

    def _read_direct(self, direct: WeightFiles, extent: Extent, into: memoryview) -> bool:
        """Whether ``extent`` could be read directly; if not, it has to be a buffered read."""
        try:
            with direct.in_use(0):
                return self._read_blocks(direct, extent, into)
        except ClosedError:  # another thread's read was refused meanwhile, or the reader is closed
            return False

    def _read_blocks(self, direct: WeightFiles, extent: Extent, into: memoryview) -> bool:
        done = 0
        while done < extent.nbytes:
            try:
                got = direct.read_once(0, extent.offset + done, into[done:])
            except OSError as error:
                # Some filesystems refuse only at the first read, not when the file is opened.
                if error.errno in _REFUSED and done == 0:
                    self.fall_back(extent.file, error)
                    return False
                raise WeightFiles.error(direct.paths[0], extent.offset + done, error) from error
            if done + got >= extent.nbytes:
                break
            # A short read may end inside a block; the next one has to begin on a block again.
            whole = (done + got) // BLOCK_BYTES * BLOCK_BYTES
            # Less than a block: the file shrank, or its filesystem returns small pieces. A buffered read shows which.
            if whole <= done:
                return False
            done = whole
        return True

    def _read_buffered(self, extent: Extent, into: memoryview) -> None:
        self._buffered.read(extent.file, extent.offset, into[: extent.nbytes])
        if hasattr(os, "posix_fadvise"):
            descriptor = self._buffered.descriptors[extent.file]
            os.posix_fadvise(descriptor, extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)

    def interrupt(self) -> None:
        """Repeat no reads that fail; one in progress ends soon."""
        self._guard.stop()

    def close(self) -> None:
        """Close the files, those of reads in progress when these return."""
        self._buffered.close()
        for direct in self._direct:
            if direct is not None:
                direct.close()
        self._guard.close()
