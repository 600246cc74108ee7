"""Threads that make the calls that are queued, and that can be left behind in a call that never returns.

Of the threads that have nothing to do, the one that was the last to have something takes the next call. OpenMP, with which torch
computes, has helpers for each thread that has ever called it; as soon as there are more of them than processors, all of them fall
asleep between two operations, and waking them takes longer than many an operation. Taking turns, calls that come one
after another would give every thread its helpers.
"""

import functools
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, ClassVar

from layerstream.stages.process.forks import refuse_fork

__all__ = ["ThreadPool"]

# At the interpreter's exit, calls in progress may take so long: torch's must not be cut off in the middle.
_EXIT_SECONDS = 10.0

_Call = tuple[Future[Any], Callable[[], Any]]
_Signals = queue.SimpleQueue[bool | None]


class ThreadPool:
    """Like ``concurrent.futures.ThreadPoolExecutor``, whose calls all have to return: it waits for each, even at exit.

    A read of a disk that hangs never returns, and cannot be stopped. ``abandon`` fails the futures of such calls, and
    nobody waits for their threads any more. What such a call holds (a buffer, a descriptor) it has to refer to, and is freed
    if it returns after all.

    Args:
        count: The number of threads, all of which are started at once.
        name: What the names of the threads begin with.

    Raises:
        RuntimeError: The system starts no more threads.
    """

    _open: ClassVar["weakref.WeakSet[ThreadPool]"] = weakref.WeakSet()

    def __init__(self, count: int, name: str) -> None:
        self._process = os.getpid()
        self._shared = _Shared(count)
        threads = [
            threading.Thread(
                target=_work, args=(self._shared, queued), name=f"{name}_{number}", daemon=True
            )
            for number, queued in enumerate(self._shared.queues)
        ]
        self._started: list[threading.Thread] = []
        # A pool that is dropped without being closed.
        weakref.finalize(self, _dismiss, self._shared).atexit = False
        _close_all_at_exit()
        try:
            for thread in threads:
                thread.start()
                self._started.append(thread)
        except BaseException:
            self.close()
            raise
        self._open.add(self)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Queue ``call``.

        Raises:
            ClosedError: This process was forked from that of the pool: it has none of the threads.
            RuntimeError: The pool is closed.
        """
        refuse_fork(self._process)
        future: Future[Any] = Future()
        with self._shared.changed:
            if self._shared.closed:
                raise RuntimeError("the threads were closed")
            self._shared.calls.append((future, call))
            if self._shared.idle:
                self._shared.idle.pop().put(True)
        return future

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """Fail the calls in progress with an ``error`` each, and close without waiting for them; returns whether there are any."""
        self._close_queue()
        shared = self._shared
        stuck = [
            thread
            for thread, future in tuple(shared.running.items())
            if _settle(future.set_exception, error())
        ]
        with shared.changed:
            shared.left.update(stuck)
            shared.changed.notify_all()
        return bool(stuck)

    def close(self, *, at_most_seconds: float | None = None) -> None:
        """Cancel the calls that have not begun, and wait for those that have, except abandoned ones. May be called again."""
        if (
            os.getpid() != self._process
        ):  # a copy in a forked process, which has none of the threads
            return
        self._close_queue()
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(
                lambda: all(each in shared.ended | shared.left for each in self._started),
                at_most_seconds,
            )
            ended = [*shared.ended]
        for thread in ended:
            thread.join()
        self._open.discard(self)

    def _close_queue(self) -> None:
        with self._shared.changed:
            if self._shared.closed:
                return
            self._shared.closed = True
            calls = [*self._shared.calls]
            self._shared.calls.clear()
        for future, _ in calls:
            future.cancel()
        _dismiss(self._shared)

    @classmethod
    def close_all(cls) -> None:
        """Close every pool of this process, at its exit."""
        for pool in tuple(cls._open):
            pool.close(at_most_seconds=_EXIT_SECONDS)


class _Shared:
    """What a pool and its threads share. The threads do not refer to the pool, so that it may be dropped.

    Attributes:
        calls: What waits for a thread; taken in order, by whoever is free or wakes first.
        queues: One for each thread: True wakes it, None ends it.
        idle: The queues of the threads that wait for a call; the last is that of the thread that began to wait last.
        running: The calls in progress.
        ended: The threads that have ended, or are about to.
        left: The threads that were abandoned.
        closed: No more calls are taken.
        changed: Notified when threads end or are left; held to change anything.
    """

    def __init__(self, count: int) -> None:
        self.calls: deque[_Call] = deque()
        self.queues: list[_Signals] = [queue.SimpleQueue() for _ in range(count)]
        self.idle: list[_Signals] = []
        self.running: dict[threading.Thread, Future[Any]] = {}
        self.ended: set[threading.Thread] = set()
        self.left: set[threading.Thread] = set()
        self.closed = False
        self.changed = threading.Condition()

    def next_call(self, own: _Signals) -> _Call | None:
        """Wait for a call, in the thread that has the queue ``own``; None: the thread is to end."""
        while True:
            with self.changed:
                if self.calls:
                    return self.calls.popleft()
                self.idle.append(own)
            if own.get() is None:
                return None


def _work(shared: _Shared, own: _Signals) -> None:
    """Make calls until the thread is to end."""
    thread = threading.current_thread()
    while (queued := shared.next_call(own)) is not None:
        future, call = queued
        if future.set_running_or_notify_cancel():
            shared.running[thread] = future
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                del shared.running[thread]
                _settle(future.set_exception, error)
            else:
                del shared.running[thread]
                _settle(future.set_result, result)
                del result
        del queued, future, call  # while this waits for the next one, they would be kept
    with shared.changed:
        shared.ended.add(thread)
        shared.changed.notify_all()


def _settle(settle: Callable[[Any], None], outcome: Any) -> bool:
    """Whether the future was still waited for, and not abandoned or done."""
    try:
        settle(outcome)
    except InvalidStateError:
        return False
    finally:
        del settle, outcome  # an error refers to this frame, which would refer to the error
    return True


def _dismiss(shared: _Shared) -> None:
    """Let the threads end after the calls that are queued. The garbage collector may call this anywhere."""
    for own in shared.queues:
        own.put(None)


@functools.cache
def _close_all_at_exit() -> None:
    # Not atexit: other threads, which may need a pool to end, are waited for before that is called.
    threading._register_atexit(ThreadPool.close_all)  # type: ignore[attr-defined]  # noqa: SLF001
