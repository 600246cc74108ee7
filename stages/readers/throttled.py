"""Direct reads at a constant rate below the disk's."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from layerstream.stages.batch import Extent
from layerstream.stages.readers.direct import DirectReader
from layerstream.stages.readers.files import FileVersion
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["Throttle", "ThrottledReader"]


class Throttle:
    """A simulated disk of a constant rate, which all readers share that read from it.

    Args:
        bytes_per_second: The rate, over all readers and threads together.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0  # when it is done with all requests so far

    def done_at(self, nbytes: int) -> float:
        """Request so many bytes; returns when it is done with them, in ``time.perf_counter`` seconds."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + nbytes / self._rate
            return self._free_at


class ThrottledReader(DirectReader):
    """Direct reads at a constant rate below the disk's, for repeatable comparisons and what-if runs.

    Args:
        paths: The weight files.
        throttle: What to wait for.
        expected: The versions that they have to be; by default any.
        guard: Watches over the reads; by default one of its own.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        throttle: Throttle,
        *,
        expected: Sequence[FileVersion] = (),
        guard: ReadGuard | None = None,
    ) -> None:
        super().__init__(paths, expected=expected, guard=guard)
        self._throttle = throttle
        self._closing = threading.Event()

    def read(self, extent: Extent, into: memoryview) -> None:
        """Read, and return no sooner than a disk of the given rate would."""
        due = self._throttle.done_at(extent.nbytes)
        super().read(extent, into)
        self._closing.wait(max(0.0, due - time.perf_counter()))

    def interrupt(self) -> None:
        """Make all waiting reads return at once, and later ones, too."""
        self._closing.set()
        super().interrupt()
