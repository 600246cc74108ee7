"""Weight files that single rows are read from."""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from layerstream.pipeline.checkpoint.formats.format import WeightFile
from layerstream.stages.errors import ClosedError
from layerstream.stages.readers.files import WeightFiles
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["FileSpan", "TableSource"]


class FileSpan(NamedTuple):
    """Bytes of a file, and the buffer that they are read into."""

    file: int
    """Its number in the source."""
    offset: int
    buffer: memoryview


class TableSource:
    """The weight files that rows are read from, by any number of threads; owns their descriptors.

    Reads go through the page cache, unlike those of the layers: rows are far smaller than the blocks of O_DIRECT, and
    the same ones are read again and again.

    Args:
        files: The files, by numbers of the caller's.
        guard: Watches over the reads; by default one of its own.

    Raises:
        ReadError: A file cannot be opened, or has changed since its header was read.
    """

    def __init__(self, files: Mapping[int, WeightFile], guard: ReadGuard | None = None) -> None:
        self._index = {number: index for index, number in enumerate(files)}
        versions = [file.version for file in files.values() if file.version is not None]
        self._files = WeightFiles(
            [file.path for file in files.values()],
            expected=versions if len(versions) == len(files) else (),
        )
        # Of rows that lie anywhere the system would read ahead 128 KiB each.
        for descriptor in self._files.descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._guard = guard or ReadGuard()
        self._owns_guard = guard is None
        self._lock = threading.Lock()
        self._active_reads = 0
        self._closed = False

    def path(self, file: int) -> Path:
        """The path of the file with this number."""
        return self._files.paths[self._index[file]]

    def read_into(self, spans: Sequence[FileSpan]) -> None:
        """Fill the buffer of each span with its bytes.

        Raises:
            ReadError: A file is too short, or cannot be read.
            ClosedError: The source has been closed.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(
                    f"{self._files.paths[0]} was closed with its model; open the model again."
                )
            self._active_reads += 1
        try:
            # All spans are requested at once, so that the disk works on them in parallel.
            for file, offset, buffer in spans:
                descriptor = self._files.descriptors[self._index[file]]
                os.posix_fadvise(descriptor, offset, len(buffer), os.POSIX_FADV_WILLNEED)
            for file, offset, buffer in spans:
                self._files.read(self._index[file], offset, buffer, self._guard)
            for file in {span.file for span in spans}:
                self._files.refuse_change(self._index[file])
        finally:
            with self._lock:
                self._active_reads -= 1
                self._close_when_idle()

    def close(self) -> None:
        """Refuse further reads. The descriptors are closed when the last read in progress ends."""
        with self._lock:
            self._closed = True
            self._close_when_idle()

    def _close_when_idle(self) -> None:
        # Closed during a read, the descriptor's number might already belong to another file.
        if self._closed and not self._active_reads:
            self._files.close()
            if self._owns_guard:
                self._guard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
