"""Weight files that single rows are read from."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from layerstream.pipeline.checkpoint.formats.format import WeightFile
from layerstream.stages.readers.files import WeightFiles
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.interruptible import InterruptibleReads

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
        reads: Makes the reads; by default the threads that look rows up do so.

    Raises:
        ReadError: A file cannot be opened, or has changed since its header was read.
    """

    def __init__(
        self,
        files: Mapping[int, WeightFile],
        *,
        guard: ReadGuard | None = None,
        reads: InterruptibleReads | None = None,
    ) -> None:
        self._guard = ReadGuard() if guard is None else guard.part()
        self._index = {number: index for index, number in enumerate(files)}
        versions = [file.version for file in files.values() if file.version is not None]
        self._files = WeightFiles(
            [file.path for file in files.values()],
            self._guard,
            expected=versions if len(versions) == len(files) else (),
        )
        # Of rows that lie anywhere the system would read ahead 128 KiB each.
        for descriptor in self._files.descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._reads = reads

    def path(self, file: int) -> Path:
        """The path of the file with this number."""
        return self._files.paths[self._index[file]]

    def read_into(self, spans: Sequence[FileSpan]) -> None:
        """Fill the buffer of each span with its bytes.

        Raises:
            ReadError: A file is too short, or cannot be read.
            ClosedError: The source has been closed.
        """
        if self._reads is None:
            self._read(spans)
        else:
            self._reads.run(partial(self._read, spans))

    def _read(self, spans: Sequence[FileSpan]) -> None:
        with ExitStack() as uses:
            descriptors = {
                file: uses.enter_context(self._files.in_use(self._index[file]))
                for file in {span.file for span in spans}
            }
            # All spans are requested at once, so that the disk works on them in parallel.
            for file, offset, buffer in spans:
                with self._guard.watching(self.path(file), offset):
                    os.posix_fadvise(descriptors[file], offset, len(buffer), os.POSIX_FADV_WILLNEED)
            for file, offset, buffer in spans:
                self._files.read(self._index[file], offset, buffer)
            for file in descriptors:
                self._files.refuse_change(self._index[file])

    def close(self) -> None:
        """Refuse further reads. A descriptor in use is closed when the last read in progress ends."""
        self._files.close()
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
