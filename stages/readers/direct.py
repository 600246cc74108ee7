"""Direct reads: from the disk into slots, past the page cache."""

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from layerstream.stages.batch import Extent
from layerstream.stages.errors import ReadError
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

    Where a filesystem refuses O_DIRECT (tmpfs, some overlay and network filesystems), reads are buffered and
    the pages that they leave in the page cache are dropped at once.

    Args:
        paths: The weight files.
        expected: The versions that they have to be; by default any.
        guard: Watches over the reads; by default one of its own.

    Attributes:
        falls_back: Reads are buffered.

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
        self._guard = guard or ReadGuard()
        self._owns_guard = guard is None
        self._buffered = WeightFiles(paths, expected=expected)
        self._direct: WeightFiles | None = None
        self.falls_back = not hasattr(os, "O_DIRECT")
        if self.falls_back:
            return
        try:
            self._direct = WeightFiles(paths, os.O_DIRECT, expected=expected)
        except ReadError as error:
            if getattr(error.__cause__, "errno", None) not in _REFUSED:
                self._buffered.close()
                raise
            self._fall_back(error)

    def _fall_back(self, error: BaseException) -> None:
        self.falls_back = True
        logger.warning(
            "direct reads are refused here (%s); reading through the page cache and dropping it behind",
            # Not the error itself: its frames would keep the slot alive as long as the log record.
            str(error),
        )

    def read(self, extent: Extent, into: memoryview) -> None:
        """Read with ``preadv``, directly where the filesystem allows it."""
        if self.falls_back or not self._read_direct(extent, into):
            self._read_buffered(extent, into)
        self._buffered.refuse_change(extent.file)

    def _read_direct(self, extent: Extent, into: memoryview) -> bool:
        """Whether ``extent`` could be read directly; if not, it has to be a buffered read."""
        assert self._direct is not None  # noqa: S101
        descriptor, done = self._direct.descriptors[extent.file], 0
        path = self._direct.paths[extent.file]

        def read() -> int:
            return os.preadv(descriptor, [into[done:]], extent.offset + done)

        while done < extent.nbytes:
            try:
                got = self._guard.run(read, path=path, offset=extent.offset + done)
            except OSError as error:
                # Some filesystems refuse only at the first read, not when the file is opened.
                if error.errno in _REFUSED and done == 0:
                    self._fall_back(error)
                    return False
                raise WeightFiles.error(path, extent.offset + done, error) from error
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
        self._buffered.read(extent.file, extent.offset, into[: extent.nbytes], self._guard)
        if hasattr(os, "posix_fadvise"):
            descriptor = self._buffered.descriptors[extent.file]
            os.posix_fadvise(descriptor, extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)

    def interrupt(self) -> None:
        """Repeat no reads that fail; one in progress ends soon."""
        self._guard.stop()

    def close(self) -> None:
        """Close the files."""
        self._buffered.close()
        if self._direct is not None:
            self._direct.close()
        if self._owns_guard:
            self._guard.close()
