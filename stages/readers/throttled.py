"""Direct reads at a constant rate below the disk's."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from layerstream.stages.batch import Extent
from layerstream.stages.readers.direct import DirectReader
from layerstream.stages.readers.files import FileVersion
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["ThrottledReader"]


class ThrottledReader(DirectReader):
    """Direct reads at a constant rate below the disk's, for repeatable comparisons and what-if runs.

    Args:
        paths: The weight files.
        bytes_per_second: The rate, over all threads together.
        expected: The versions that they have to be; by default any.
        guard: Watches over the reads; by default one of its own.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        bytes_per_second: float,
        *,
        expected: Sequence[FileVersion] = (),
        guard: ReadGuard | None = None,
    ) -> None:
        super().__init__(paths, expected=expected, guard=guard)
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the simulated disk is done with all requests so far
        self._closing = threading.Event()

    def read(self, extent: Extent, into: memoryview) -> None:
        """Read, and return no sooner than a disk of the given rate would."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + extent.nbytes / self._rate
            due = self._free_at
        super().read(extent, into)
        self._closing.wait(max(0.0, due - time.perf_counter()))

    def interrupt(self) -> None:
        """Make all waiting reads return at once, and later ones, too."""
        self._closing.set()
        super().interrupt()
