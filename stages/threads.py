"""Blocking calls off the event loop, in threads of our own, which are never abandoned."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from layerstream.stages.errors import ClosedError

__all__ = ["Once", "Threads", "finish_in_thread", "refuse_fork", "wait_all"]

P = ParamSpec("P")
T = TypeVar("T")


def refuse_fork(owner: int) -> None:
    """Refuse to go on in a process that was forked from process ``owner``, whose threads are not in this one.

    Raises:
        ClosedError: This is another process.
    """
    if os.getpid() != owner:
        raise ClosedError(
            f"the model was opened in process {owner}, and this one was forked from it, without the threads that stream; "
            "open a model in each process, or start workers with multiprocessing's 'spawn'"
        )


class Threads:
    """A named pool of threads that belongs to one stage.

    The loop's default executor is shared with the service that embeds us, so each stage has its own.
    """

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"layerstream-{name}")

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue ``call`` and return at once."""
        return self._pool.submit(call, *args, **kwargs)

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
        """Drop the calls that have not begun and wait for those that have."""
        self._pool.shutdown(wait=True, cancel_futures=True)


async def wait_all(futures: Iterable[Future[T]], *, droppable: bool = False) -> None:
    """Wait until every future is done, whatever its outcome, even if the waiting task is cancelled.

    A thread that fills a buffer cannot be stopped, and the buffer must not be used again before it has ended.
    So a cancellation is raised only then; ``droppable`` calls that have not begun are cancelled with it.
    """
    calls = list(futures)
    waiting = [asyncio.wrap_future(call) for call in calls]

    def drop() -> None:
        for call in calls if droppable else ():
            call.cancel()

    try:
        await _all_done(waiting, on_cancel=drop)
    finally:
        for future in waiting:
            if not future.cancelled():
                future.exception()  # marked as retrieved: callers take results from the calls themselves


async def finish_in_thread(call: Callable[[], T]) -> T:
    """Run one long call in a thread of its own and wait until it ends, even if the waiting task is cancelled."""
    threads = Threads("once", 1)
    try:
        return await threads.run(call)
    finally:
        threads.close()


class Once:
    """Work that is done once and completely, however many tasks request it and are cancelled."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do ``work``, or wait until it is done. A cancellation is raised only then."""
        if self._task is None:
            self._task = asyncio.create_task(work())
        await _all_done([self._task])
        self._task.result()


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
        raise cancelled
