"""Watches over single reads: repeats those that fail for a passing reason, reports those that hang, and gives them up."""

import errno
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from layerstream.stages.errors import ReadError
from layerstream.stages.readers.watch import HangingRead, ReadWatch

__all__ = ["HangingRead", "ReadGuard"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A controller that resets its link, a path of a network disk that changes, a queue that is full: the same request
# succeeds a moment later. Other errors (a file that is gone, no permission) stay what they are.
_PASSING = frozenset(
    {
        errno.EINTR,
        errno.EAGAIN,
        errno.EIO,
        errno.ETIMEDOUT,
        errno.ENXIO,
        errno.ENODEV,
        errno.ESTALE,
        errno.EBUSY,
        errno.ENOMEM,
    }
)
# Together half a second, beside what the driver has tried by itself.
_PAUSES_SECONDS = (0.01, 0.1, 0.4)
# Between the attempts of who waits for a disk to work again, each twice as long as the one before.
_FIRST_PATIENT_PAUSE_SECONDS = 0.5
_LONGEST_PATIENT_PAUSE_SECONDS = 5.0
# A disk that spins up takes ten seconds, and a network path that fails over twenty.
_REPORTED_AFTER_SECONDS = 30.0


class _Calls(Protocol):
    """Calls in threads, some of which read."""

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """Fail the calls in progress with an ``error`` each, and wait for none of them any more; whether there are any."""


class ReadGuard:
    """Runs reads, from any number of threads. Close it after the last one.

    Args:
        reported_after_seconds: A read that takes longer hangs: it is logged, again whenever it has taken twice as long, and is
            among ``hanging()``. Whoever closes or opens something does not wait for it.
        patience_seconds: How long ``patiently`` goes on.
        watch: That of the whole of which this is a part.

    Attributes:
        stopped: Done as soon as ``stop`` was called.
    """

    def __init__(
        self,
        reported_after_seconds: float = _REPORTED_AFTER_SECONDS,
        patience_seconds: float = 0.0,
        *,
        watch: ReadWatch | None = None,
    ) -> None:
        self._owns_watch = watch is None
        self._patience_seconds = patience_seconds
        self.stopped: Future[None] = Future()
        give_up = weakref.WeakMethod(self._give_up)
        self._watch = watch or ReadWatch(
            reported_after_seconds, lambda hanging: (call := give_up()) and call(hanging)
        )
        if watch is None:  # for one that is dropped without being closed
            weakref.finalize(self, self._watch.end).atexit = False
        self._waiting: set[Future[None]] = set()
        self._parts: weakref.WeakSet[ReadGuard] = weakref.WeakSet()
        self._given_up_when_stopped: weakref.WeakSet[_Calls] = weakref.WeakSet()
        self._given_up_in_faults: weakref.WeakSet[_Calls] = weakref.WeakSet()
        self._given_up_at_once: list[_Calls] = []
        self._lock = threading.Lock()

    def part(self) -> "ReadGuard":
        """A guard for a part of what reads, which is stopped by itself; stopping this one stops it as well."""
        part = ReadGuard(patience_seconds=self._patience_seconds, watch=self._watch)
        with self._lock:
            self._parts.add(part)
        if self.stopped.done():
            part.stop()
        return part

    def give_up_when_stopped(self, calls: _Calls, *, in_page_faults: bool = False) -> None:
        """Abandon ``calls`` if a read hangs after ``stop``: those that fill the memory of a pipeline.

        With ``in_page_faults``, if a page of a mapped file does not come instead: those that compute with mapped files.
        """
        with self._lock:
            (self._given_up_in_faults if in_page_faults else self._given_up_when_stopped).add(calls)

    @contextmanager
    def mapping(self, path: Path) -> Iterator[None]:
        """While the block runs, ``path`` is mapped, and page faults that last hang as reads do."""
        self._watch.mapped.append(path)
        try:
            yield
        finally:
            self._watch.mapped.remove(path)

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

    def run(
        self,
        call: Callable[[], T],
        *,
        path: Path,
        offset: int = 0,
        before_last: Callable[[], None] = lambda: None,
    ) -> T:
        """Call ``call``, which opens ``path`` or reads it at ``offset``, up to four times.

        Args:
            call: What to call.
            path: The file.
            offset: Where in it.
            before_last: Called before the last attempt, for what may help if waiting alone has not.

        Raises:
            OSError: What it raised last.
        """
        for attempt in itertools.count(1):
            try:
                with self.watching(path, offset):
                    return call()
            except OSError as error:
                pause = self.pause_seconds(error, attempt, path=path, offset=offset)
                if pause is None:
                    raise
                self._pause(pause)
                if self.stopped.done():
                    raise
            if attempt == len(_PAUSES_SECONDS):
                before_last()
        raise AssertionError  # unreachable

    def pause_seconds(
        self, error: OSError, attempt: int, *, path: Path, offset: int
    ) -> float | None:
        """How long to pause after attempt number ``attempt``, from 1, has failed; None if there is not to be another one."""
        if error.errno not in _PASSING or attempt > len(_PAUSES_SECONDS) or self.stopped.done():
            return None
        pause = _PAUSES_SECONDS[attempt - 1]
        logger.warning(
            "%s: reading at offset %d failed: %s; attempt %d of %d follows in %g s",
            path,
            offset,
            error.strerror or os.strerror(error.errno),
            attempt + 1,
            len(_PAUSES_SECONDS) + 1,
            pause,
        )
        return pause

    def patiently(
        self, read: Callable[[], None], *, pause: Callable[[float], None] | None = None
    ) -> None:
        """Call ``read``, again and again while its disk fails for a passing reason: for as long as this has patience.

        Args:
            read: Reads with ``run``.
            pause: Waits for so many seconds, or less if this is stopped; it may raise instead. By default it blocks.

        Raises:
            ReadError: What it raised last.
        """
        until = time.monotonic() + self._patience_seconds
        longest = _FIRST_PATIENT_PAUSE_SECONDS
        while True:
            try:
                return read()
            except ReadError as error:
                cause = error.__cause__
                passing = isinstance(cause, OSError) and cause.errno in _PASSING
                seconds = min(longest, until - time.monotonic())
                if not passing or seconds <= 0 or self.stopped.done():
                    raise
                logger.warning("%s; it is read again in %.1f s", str(error), seconds)
            (pause or self._pause)(seconds)
            longest = min(2 * longest, _LONGEST_PATIENT_PAUSE_SECONDS)

    @contextmanager
    def stopping(self) -> Iterator[Future[None]]:
        """A future that is done as soon as this is stopped, for one who waits during the block.

        What waits for a future leaves a callback on it, which ``stopped`` would collect as long as this lives.
        """
        future: Future[None] = Future()
        with self._lock:
            self._waiting.add(future)
            if self.stopped.done():
                future.set_result(None)
        try:
            yield future
        finally:
            with self._lock:
                self._waiting.discard(future)

    def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            self.stopped.result(seconds)

    @contextmanager
    def watching(self, path: Path, offset: int = 0) -> Iterator[None]:
        """Watch over the block, which reads ``path`` at ``offset``, and repeat nothing."""
        with self._watch.watching(path, offset):
            yield

    def hanging(self) -> tuple[HangingRead, ...]:
        """The reads that have been in progress for longer than the limit, those of the whole and all its parts."""
        return self._watch.hanging()

    def stop(self) -> None:
        """Repeat nothing more, end the pauses, and wait no longer for reads that hang: what they belong to is closed."""
        with self._lock:
            parts = [*self._parts]
            if not self.stopped.done():
                self.stopped.set_result(None)
                for future in self._waiting:
                    future.set_result(None)
        for part in parts:
            part.stop()

    def close(self) -> None:
        """Stop, and watch no more, if this is the whole. May be called again."""
        self.stop()
        if self._owns_watch:
            self._watch.close()

    def _give_up(self, hanging: HangingRead) -> None:
        message = (
            f"{hanging} and is not waited for any longer: its disk or network hangs; its thread and memory are left until "
            "it does"
        )
        calls = self.calls_to_give_up(in_page_faults=hanging.offset is None)
        if any([each.abandon(lambda: ReadError(message)) for each in calls]):  # noqa: C419 - all of them
            logger.warning("%s", message)

    def calls_to_give_up(self, *, in_page_faults: bool = False) -> list[_Calls]:
        """What a read that hangs, or a page that does not come, is not to hold up any longer."""
        with self._lock:
            parts, calls = [*self._parts], [] if in_page_faults else [*self._given_up_at_once]
            if self.stopped.done():
                calls += self._given_up_in_faults if in_page_faults else self._given_up_when_stopped
        for part in parts:
            calls += part.calls_to_give_up(in_page_faults=in_page_faults)
        return calls
