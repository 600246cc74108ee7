"""Watches over single reads: repeats those that fail for a passing reason, reports those that hang, and gives them up."""

import errno
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from layerstream.stages.errors import ReadError

__all__ = ["HangingRead", "ReadGuard"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A controller that resets its link, a path of a network disk that changes, a queue that is full: the same request
# succeeds a moment later. Other errors (a file that is gone, no permission) stay what they are.
_PASSING = frozenset(
    {errno.EINTR, errno.EAGAIN, errno.EIO, errno.ETIMEDOUT, errno.ENXIO, errno.EBUSY, errno.ENOMEM}
)
# Together half a second, beside what the driver has tried by itself.
_PAUSES_SECONDS = (0.01, 0.1, 0.4)
# A disk that spins up takes ten seconds, and a network path that fails over twenty.
_REPORTED_AFTER_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HangingRead:
    """A read that has been in progress for long."""

    path: str
    offset: int
    seconds: float


class _Calls(Protocol):
    """Calls in threads, some of which read."""

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """Fail the calls in progress with an ``error`` each, and wait for none of them any more; whether there are any."""


class ReadGuard:
    """Runs reads, from any number of threads. Close it after the last one.

    Args:
        reported_after_seconds: A read that takes longer hangs: it is logged, again whenever it has taken twice as long, and is
            among ``hanging()``. Whoever closes or opens something does not wait for it.
    """

    def __init__(self, reported_after_seconds: float = _REPORTED_AFTER_SECONDS) -> None:
        self._reported_after_seconds = reported_after_seconds
        self._numbers = itertools.count()
        # By number; written by single operations, which are atomic.
        self._reads: dict[int, tuple[Path, int, float]] = {}
        self._given_up_when_stopped: weakref.WeakSet[_Calls] = weakref.WeakSet()
        self._given_up_at_once: list[_Calls] = []
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None

    def give_up_when_stopped(self, calls: _Calls) -> None:
        """Abandon ``calls`` if a read hangs after ``stop``: those that fill the memory of a pipeline."""
        with self._lock:
            self._given_up_when_stopped.add(calls)

    @contextmanager
    def giving_up(self, calls: _Calls) -> Iterator[None]:
        """While the block runs, abandon ``calls`` as soon as a read hangs: those that open something."""
        with self._lock:
            self._given_up_at_once.append(calls)
        try:
            yield
        finally:
            with self._lock:
                self._given_up_at_once.remove(calls)

    def run(self, call: Callable[[], T], *, path: Path, offset: int) -> T:
        """Call ``call``, which reads ``path`` at ``offset``, up to four times.

        Raises:
            OSError: What it raised last.
        """
        for attempt, pause in enumerate(_PAUSES_SECONDS, start=2):
            try:
                return self._timed(call, path, offset)
            except OSError as error:
                if error.errno not in _PASSING or self._stopping.is_set():
                    raise
                logger.warning(
                    "%s: reading at offset %d failed: %s; attempt %d of %d follows in %g s",
                    path,
                    offset,
                    error.strerror or os.strerror(error.errno),
                    attempt,
                    len(_PAUSES_SECONDS) + 1,
                    pause,
                )
            self._stopping.wait(pause)
        return self._timed(call, path, offset)

    def _timed(self, call: Callable[[], T], path: Path, offset: int) -> T:
        with self.watching(path, offset):
            return call()

    @contextmanager
    def watching(self, path: Path, offset: int = 0) -> Iterator[None]:
        """Watch over the block, which reads ``path`` at ``offset``, and repeat nothing."""
        if self._watcher is None:
            self._watch()
        number = next(self._numbers)
        self._reads[number] = path, offset, time.monotonic()
        try:
            yield
        finally:
            del self._reads[number]

    def hanging(self) -> tuple[HangingRead, ...]:
        """The reads that have been in progress for longer than the limit."""
        now = time.monotonic()
        return tuple(
            HangingRead(path=str(path), offset=offset, seconds=now - began)
            for path, offset, began in tuple(self._reads.values())
            if now - began >= self._reported_after_seconds
        )

    def stop(self) -> None:
        """Repeat nothing more, end the pauses, and wait no longer for reads that hang: what they belong to is closed."""
        self._stopping.set()

    def resume(self) -> None:
        """Repeat and wait again: what was closed is opened again."""
        self._stopping.clear()

    def close(self) -> None:
        """Stop watching. May be called again."""
        self.stop()
        self._closing.set()
        with self._lock:
            watcher = self._watcher
        if watcher is not None and watcher.ident is not None:
            watcher.join()

    # -- the watcher -----------------------------------------------------------------------------

    def _watch(self) -> None:
        with self._lock:
            if self._watcher is None:
                self._watcher = threading.Thread(
                    target=self._report, name="layerstream-read-guard", daemon=True
                )
                with suppress(RuntimeError):  # no thread can be started: reads go on unwatched
                    self._watcher.start()

    def _report(self) -> None:
        due: dict[tuple[str, int], float] = {}
        while not self._closing.wait(self._reported_after_seconds / 4):
            hanging = self.hanging()
            due = {key: due[key] for each in hanging if (key := (each.path, each.offset)) in due}
            for each in hanging:
                if each.seconds >= due.get((each.path, each.offset), 0.0):
                    due[each.path, each.offset] = 2 * each.seconds
                    logger.warning(
                        "%s: a read at offset %d has not returned for %.0f s: the disk or its network hangs",
                        each.path,
                        each.offset,
                        each.seconds,
                    )
            if hanging:
                self._give_up(hanging[0])

    def _give_up(self, hanging: HangingRead) -> None:
        with self._lock:
            calls = [*self._given_up_at_once]
            if self._stopping.is_set():
                calls += self._given_up_when_stopped
        message = (
            f"{hanging.path}: a read at offset {hanging.offset} has not returned for {hanging.seconds:.0f} s and is not "
            "waited for any longer: its disk or network hangs; its thread and buffer are left until it returns"
        )
        if any([each.abandon(lambda: ReadError(message)) for each in calls]):  # noqa: C419 - all of them
            logger.warning("%s", message)
