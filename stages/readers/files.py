"""The weight files that a reader has open."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from layerstream.stages.errors import ReadError

__all__ = ["WeightFiles"]


class WeightFiles:
    """Open descriptors of the weight files, and the errors that name the file.

    Args:
        paths: The files.
        flags: For ``os.open``, in addition to those for reading.

    Raises:
        ReadError: A file cannot be opened; the others have been closed again.
    """

    def __init__(self, paths: Sequence[Path], flags: int = 0) -> None:
        self.paths = paths
        self.descriptors: list[int] = []
        with ExitStack() as opened:
            for path in paths:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
                except OSError as error:
                    raise self.error(path, 0, error) from error
                opened.callback(os.close, descriptor)
                self.descriptors.append(descriptor)
            self._opened = opened.pop_all()

    @staticmethod
    def error(path: Path, offset: int, error: OSError) -> ReadError:
        """The error to raise when a system call on ``path`` fails with ``error``."""
        return ReadError(
            f"{path}: reading at offset {offset} failed: {error.strerror or error} (errno {error.errno}); "
            "check the disk and that the file is readable"
        )

    def shrank(self, file: int, needed: int) -> ReadError:
        """The error to raise when ``file`` has fewer than ``needed`` bytes."""
        size = os.fstat(self.descriptors[file]).st_size
        return ReadError(
            f"{self.paths[file]}: holds {size} bytes now, but {needed} are needed: it was changed while it "
            "was streamed; restore the file and open the model again"
        )

    def close(self) -> None:
        """Close the files."""
        self._opened.close()
