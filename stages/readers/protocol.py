"""What the read stage needs of a reader."""

from typing import Protocol

from layerstream.stages.batch import Extent

__all__ = ["Reader"]


class Reader(Protocol):
    """Reads extents of the weight files, from several threads at once."""

    def read(self, extent: Extent, into: memoryview) -> None:
        """Fill the first ``extent.nbytes`` of ``into``, whose length is rounded up to whole blocks.

        Raises:
            ReadError: The file is too short, or the disk reports an error.
        """

    def interrupt(self) -> None:
        """Make calls that merely wait return at once: the pipeline is closing."""

    def close(self) -> None:
        """Close the files. Called when no other call is in progress."""
