"""Calls that KeyboardInterrupt does not leave half done."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from layerstream.stages.threads import thread_refused

__all__ = ["WholeCalls"]

T = TypeVar("T")


class WholeCalls:
    """Makes short calls, none of which ends in the middle because of a signal.

    Python raises what signals bring about between any two lines of the main thread, and only there. So a thread of our own
    makes the calls of the main thread, one after the other: whoever is interrupted while it waits for one finds it done by
    the next one. Other threads make their calls themselves.

    Locks and queues here are those in C: ``threading.Condition`` may be interrupted before it gives up its lock.

    Raises:
        DeviceError: The system starts no more threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_work, args=(self._queue,), name="layerstream-whole-calls", daemon=True
        )
        # For a store that is dropped without being closed: the thread does not refer to it.
        weakref.finalize(self, self._queue.put, None).atexit = False
        try:
            self._thread.start()
        except RuntimeError as error:
            raise thread_refused(error) from error

    def make(self, call: Callable[[], T]) -> T:
        """The result of ``call``."""
        if threading.current_thread() is not threading.main_thread():
            return call()
        queued = _Call(call)
        with self._lock:
            closed = self._closed
            if not closed:
                self._queue.put(queued)
        if closed:  # there is nothing left that could be lost
            return call()
        queued.under_way.acquire()
        try:
            if queued.error is not None:
                raise queued.error
            result: T = queued.result
            return result
        finally:
            del queued  # its error would refer to this frame, and so to itself

    def close(self) -> None:
        """Calls are made where they are from now on. May be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()


class _Call:
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.under_way = threading.Lock()
        self.under_way.acquire()


def _work(calls: "queue.SimpleQueue[_Call | None]") -> None:
    """Make calls until None is queued."""
    while (queued := calls.get()) is not None:
        try:
            queued.result = queued.call()
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            queued.error = error
        queued.under_way.release()
        del queued  # while this waits for the next one, it would be kept
