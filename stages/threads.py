"""Blocking calls off the event loop, in threads of our own, never abandoned."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from layerstream.stages.errors import ClosedError

__all__ = ["Once", "Threads", "finish_in_thread", "settled"]

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A named pool of threads that belongs to one stage.

    The loop's default executor is shared with the service that embeds us, so each stage has its own.
    """

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"layerstream-{name}")

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start ``call`` and return at once."""
        return self._pool.submit(call, *args, **kwargs)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``call`` and wait for it, to its end even if the waiting task is cancelled.

        Raises:
            ClosedError: the pool was closed before the call had begun.
        """
        future = self.submit(call, *args, **kwargs)
        try:
            await settled([future])
            if future.cancelled():  # closed before a thread had taken it up
                raise ClosedError("the pipeline was closed")
            return future.result()
        finally:
            del future  # an error that it holds would hold this frame, and so itself

    def close(self) -> None:
        """Drop the calls that have not begun and wait for those that have."""
        self._pool.shutdown(wait=True, cancel_futures=True)


async def settled(futures: Iterable[Future[T]], *, droppable: bool = False) -> None:
    """Wait until every future is done, whatever its outcome.

    A thread that fills a buffer cannot be stopped, and the buffer must not be handed on before it has ended.
    So a cancellation is kept back until then; ``droppable`` calls that have not begun are cancelled with it.
    """
    calls = list(futures)
    waiting = [asyncio.wrap_future(call) for call in calls]
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in waiting):
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
            for call in calls if droppable else ():
                call.cancel()
    for future in waiting:
        if not future.cancelled():
            future.exception()  # taken note of: whoever wants it asks the call itself
    if cancelled is not None:
        raise cancelled


async def finish_in_thread(call: Callable[[], T]) -> T:
    """Run one long call in a thread of its own, to its end even if the waiting task is cancelled."""
    with ThreadPoolExecutor(1, thread_name_prefix="layerstream-once") as pool:
        future = pool.submit(call)
        try:
            await settled([future])
            return future.result()
        finally:
            del future  # an error that it holds would hold this frame, and so itself


class Once:
    """Work that is done once, to its end, whoever asks for it and however often it is cancelled."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do ``work``, or wait until it has been done. A cancellation is kept back until then."""
        if self._task is None:
            self._task = asyncio.create_task(work())
        cancelled: asyncio.CancelledError | None = None
        while not self._task.done():
            try:
                await asyncio.wait([self._task])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        self._task.result()
