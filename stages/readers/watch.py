"""Watches over single reads, and tells of those that hang."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from layerstream.stages.readers.page_faults import PageFaults

__all__ = ["HangingRead", "ReadWatch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HangingRead:
    """A read that has been in progress for long."""

    path: str
    offset: int | None
    """None: computation waits for a page of the mapped files."""
    seconds: float

    def __str__(self) -> str:
        what = (
            "a page of the mapped file"
            if self.offset is None
            else f"a read at offset {self.offset}"
        )
        return f"{self.path}: {what} has not {'come' if self.offset is None else 'returned'} for {self.seconds:.0f} s"


class ReadWatch:
    """A thread that looks at the reads in progress; it begins with the first of them. Close it.

    Args:
        reported_after_seconds: A read that takes longer hangs: it is logged, again whenever it has taken twice as long.
        on_hanging: Gets each of them, again and again.

    Attributes:
        mapped: Files that are mapped: as long as there are some, page faults are looked at, too.
    """

    def __init__(
        self, reported_after_seconds: float, on_hanging: Callable[[HangingRead], object]
    ) -> None:
        self._reported_after_seconds = reported_after_seconds
        self._on_hanging = on_hanging
        self._numbers = itertools.count()
        # By number; written by single operations, which are atomic.
        self._reads: dict[int, tuple[Path, int, float]] = {}
        self.mapped: list[Path] = []
        self._faults = PageFaults()
        self._fault_seconds = 0.0
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, path: Path, offset: int) -> Iterator[None]:
        """Watch over the block, which reads ``path`` at ``offset``."""
        if self._thread is None:
            self._start()
        number = next(self._numbers)
        self._reads[number] = path, offset, time.monotonic()
        try:
            yield
        finally:
            del self._reads[number]

    def hanging(self) -> tuple[HangingRead, ...]:
        """The reads that have been in progress for longer than the limit."""
        now = time.monotonic()
        found: list[tuple[Path, int | None, float]] = [
            (path, offset, now - began) for path, offset, began in tuple(self._reads.values())
        ]
        found += [(path, None, self._fault_seconds) for path in self.mapped[:1]]
        return tuple(
            HangingRead(path=str(path), offset=offset, seconds=seconds)
            for path, offset, seconds in found
            if seconds >= self._reported_after_seconds
        )

    def end(self) -> None:
        """Look no more, soon."""
        self._closing.set()

    def close(self) -> None:
        """Look no more, and wait for the thread to end. May be called again."""
        self.end()
        with self._lock:
            thread = self._thread
        if thread is not None and thread.ident is not None:
            thread.join()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._look, name="layerstream-read-guard", daemon=True
                )
                with suppress(RuntimeError):  # no thread can be started: reads go on unwatched
                    self._thread.start()

    def _look(self) -> None:
        due: dict[tuple[str, int | None], float] = {}
        while not self._closing.wait(self._reported_after_seconds / 4):
            self._fault_seconds = self._faults.longest_seconds() if self.mapped else 0.0
            hanging = self.hanging()
            due = {key: due[key] for each in hanging if (key := (each.path, each.offset)) in due}
            for each in hanging:
                if each.seconds >= due.get((each.path, each.offset), 0.0):
                    due[each.path, each.offset] = 2 * each.seconds
                    logger.warning("%s: the disk or its network hangs", each)
                self._on_hanging(each)
