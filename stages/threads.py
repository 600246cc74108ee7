"""Blocking calls off the event loop, in threads of our own, of which only those are abandoned that a disk holds up."""

import asyncio
import functools
import os
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from typing import Any, ClassVar, ParamSpec, TypeVar

from layerstream.stages.errors import ClosedError, DeviceError
from layerstream.stages.process.loop_end import end_with_loop
from layerstream.stages.process.thread_pool import ThreadPool
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["Lifetime", "Threads", "finish_in_thread", "thread_refused", "wait_all", "weakly"]

P = ParamSpec("P")
T = TypeVar("T")


def thread_refused(error: RuntimeError) -> DeviceError:
    """What to raise where the system starts no more threads."""
    return DeviceError(
        f"the system refuses a thread ({error}); raise the limit on processes (ulimit -u, pids.max), or end some"
    )


class Threads:
    """A named pool of threads that belongs to one stage.

    The loop's default executor is shared with the service that embeds us, so each stage has its own. All threads are
    started at once: a call that is queued later runs, or is refused because the pool is closed.

    Args:
        name: Of what the threads do.
        count: How many there are.

    Raises:
        DeviceError: The system starts no more threads.
    """

    def __init__(self, name: str, count: int) -> None:
        try:
            self._pool = ThreadPool(count, f"layerstream-{name}")
        except RuntimeError as error:
            raise thread_refused(error) from error

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue ``call`` and return at once."""
        return self._pool.submit(functools.partial(call, *args, **kwargs))

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``call`` and wait until it ends, even if the waiting task is cancelled.

        Raises:
            ClosedError: The pool was closed before the call had begun.
        """
        future = self.submit(call, *args, **kwargs)
        try:
            await wait_all([future])
            if future.cancelled():  # closed before a thread had started it
                raise ClosedError("the pipeline was closed")
            return future.result()
        finally:
            del future  # its exception would refer to this frame, and so to itself

    def close(self) -> None:
        """Drop the calls that have not begun and wait for those that have, unless they were abandoned."""
        self._pool.close()

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """Fail the calls in progress with an ``error`` each, and wait for none of them any more; whether there are any.

        For reads of a disk that hangs. Memory that such a call may still write into must not be used again: see
        ``ThreadPool``.
        """
        return self._pool.abandon(error)


async def wait_all(
    futures: Iterable[Future[T]], *, on_cancel: Callable[[Future[T]], object] = lambda _: None
) -> None:
    """Wait until every future is done, whatever its outcome, even if the waiting task is cancelled.

    A thread that fills a buffer cannot be stopped, and the buffer must not be used again before it has ended.
    So a cancellation is raised only then.

    Args:
        futures: The calls.
        on_cancel: Called with each of them whenever the waiting task is cancelled.
    """
    calls = list(futures)
    waiting = [asyncio.wrap_future(call) for call in calls]

    def cancelled() -> None:
        for call in calls:
            on_cancel(call)

    try:
        await _all_done(waiting, on_cancel=cancelled)
    finally:
        for future in waiting:
            if not future.cancelled():
                future.exception()  # marked as retrieved: callers take results from the calls themselves


async def finish_in_thread(
    call: Callable[[], T], *, without_thread: bool = False, guard: ReadGuard | None = None
) -> T:
    """Run one long call in a thread of its own and wait until it ends, even if the waiting task is cancelled.

    Args:
        call: What to run.
        guard: If a read that it watches over hangs, this raises its ReadError, and leaves the call and its result to
            themselves: for calls that change nothing, and whose result has nothing to close.
        without_thread: If the system starts no more threads, run it on the event loop: to free something, late is better
            than never.
    """
    try:
        threads = Threads("once", 1)
    except DeviceError:
        if without_thread:
            return call()
        raise
    try:
        with nullcontext() if guard is None else guard.giving_up(threads):
            return await threads.run(call)
    finally:
        threads.close()


def weakly(method: Callable[P, T]) -> Callable[P, T | None]:
    """``method``, without keeping its object; does nothing once that is gone."""
    ref = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return None if (bound := ref()) is None else bound(*args, **kwargs)

    return call


class Lifetime:
    """The task in which something is opened, stays open and is closed: each once, whatever tasks ask for it and are cancelled.

    Closing what is being opened ends the opening. If the event loop ends first, or is closed, that closes too; and
    so does the garbage collector, if nothing refers to this object any more: while it is open, its task does not.

    Args:
        what: Whose lifetime, for messages.
        again: What to do instead of opening it a second time, for messages.
        opens: Opens it, and returns what the task keeps meanwhile, since asyncio refers to tasks weakly. From that, nothing
            must lead to this object if dropping it is to close it. Cancelled by an early close; what it has opened by
            then, ``closes`` must close.
        closes: Closes it, whether opening it has succeeded or not.

    Attributes:
        closed: Closing has begun.
    """

    # asyncio has weak references to tasks only.
    _alive: ClassVar[set[asyncio.Task[None]]] = set()

    def __init__(
        self,
        what: str,
        *,
        again: str,
        opens: Callable[[], Coroutine[Any, Any, object]],
        closes: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._what = what
        self._again = again
        self._opens = opens
        self._closes = closes
        self._task: asyncio.Task[None] | None = None
        self._running = False  # the task has begun
        self._process = os.getpid()
        # Has this when the task is to close it. The garbage collector clears weak references before it calls __del__.
        self._closing: list[Lifetime] = []
        self._error: BaseException | None = None  # for the first who waits
        self.closed = False

    async def open(self) -> None:
        """Open it. If that fails, is cancelled or is ended by ``close``, everything is closed before this raises."""
        if self._task is not None or self.closed:
            raise ClosedError(f"{self._what} is opened once; {self._again}")
        self._task = self._start()
        try:
            await _all_done([self._opened], on_cancel=self._end)
        except asyncio.CancelledError as cancelled:
            await _all_done([self._task])
            raise cancelled from self._take_error()
        if self.closed:
            await self.close()
            raise ClosedError(f"{self._what} was closed while it was being opened")

    async def close(self) -> None:
        """Close it, or wait until it is closed. A cancellation is raised only then."""
        self._end()
        if self._task is None:
            self._task = self._start()
        await _all_done([self._task])
        if (error := self._take_error()) is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame, which would refer to it

    def _start(self) -> asyncio.Task[None]:
        self._loop = asyncio.get_running_loop()
        self._opened = opened = self._loop.create_future()
        task = asyncio.create_task(self._live(), name=f"layerstream-{self._what}")
        self._alive.add(task)
        end_with_loop(task)

        def ended(task: asyncio.Task[None]) -> None:
            Lifetime._alive.discard(task)
            if not opened.done():
                opened.set_result(None)

        task.add_done_callback(ended)
        return task

    def __del__(self) -> None:
        if self.closed or self._task is None or os.getpid() != self._process:
            return
        self._closing.append(self)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if not self.closed:
            self.closed = True
            if self._task is not None and self._running:
                self._closing.append(self)
                self._task.cancel()

    def _take_error(self) -> BaseException | None:
        error, self._error = self._error, None
        return error

    async def _live(self) -> None:
        self._running = True
        lifetime: Lifetime | None = self
        try:
            kept = None if self.closed else await self._opens()
            if not self.closed:
                self._opened.set_result(None)
                ref, closing = weakref.ref(self), self._closing
                del self, lifetime
                try:
                    await asyncio.get_running_loop().create_future()  # until this task is cancelled
                finally:
                    del kept
                    lifetime = ref() or next(iter(closing), None)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            self._error = error
        finally:
            if lifetime is not None:
                await lifetime._finish()  # noqa: SLF001 - of this class

    async def _finish(self) -> None:
        self.closed = True
        try:
            await self._closes()
        except asyncio.CancelledError:  # by an event loop that ends
            pass
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            self._error = self._error or error
        finally:
            self._closing.clear()


async def _all_done(
    waiting: Sequence[asyncio.Future[Any]], *, on_cancel: Callable[[], None] = lambda: None
) -> None:
    """Wait until all of ``waiting`` are done; a cancellation of the waiting task is raised only then."""
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in waiting):
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            del (
                cancelled
            )  # it refers to this frame, and so to itself and to what the calls have returned
