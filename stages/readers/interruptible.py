"""Reads for threads that must be able to leave them: a disk that hangs holds up a thread of ours instead."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.threads import Threads

__all__ = ["InterruptibleReads"]

# Rows are read when a prompt or a step begins: a few requests do so at the same time.
_THREADS = 4


class InterruptibleReads:
    """Makes reads in threads of its own, while the threads that need them wait for them.

    Args:
        guard: Gives them up when it is stopped and a read hangs. What fails is repeated with its patience.

    Attributes:
        wait: Blocks until a future is done, or some seconds have passed, if they are given. It may raise instead, which leaves
            the read to itself: so the read has to refer to the memory that it fills.
    """

    def __init__(self, guard: ReadGuard) -> None:
        self._threads = Threads("rows", _THREADS)
        guard.give_up_when_stopped(self._threads)
        self._guard = guard
        self.wait: Callable[[Future[Any], float | None], object] = Future.exception

    def run(self, read: Callable[[], None]) -> None:
        """Make ``read``, and wait for it."""
        self._guard.patiently(partial(self._run_once, read), pause=self._pause)

    def _pause(self, seconds: float) -> None:
        # In the thread that needs the read, so that a disk that fails takes no thread from reads of others.
        with suppress(TimeoutError), self._guard.stopping() as stopped:
            self.wait(stopped, seconds)

    def _run_once(self, read: Callable[[], None]) -> None:
        future = self._threads.submit(read)
        try:
            self.wait(future, None)
            future.result()
        finally:
            del future  # its exception would refer to this frame, and so to itself

    def close(self) -> None:
        """Wait for the reads in progress, except those that were given up."""
        self._threads.close()
