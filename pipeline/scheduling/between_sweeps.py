"""Tasks that run between two sweeps."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from layerstream.stages.errors import echo_of

__all__ = ["BetweenSweeps"]


class BetweenSweeps:
    """Coroutines that wait for the end of a sweep, and run in the order in which they were added."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Callable[[], Awaitable[None]], asyncio.Future[None]]] = deque()

    def __len__(self) -> int:
        """The number of coroutines that wait."""
        return len(self._queue)

    def add(self, task: Callable[[], Awaitable[None]]) -> asyncio.Future[None]:
        """Queue ``task``. The future is done when it has been run, or has its error."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((task, done))
        return done

    async def run(self) -> None:
        """Run all that wait, except those whose future was cancelled."""
        while self._queue:
            task, done = self._queue.popleft()
            if done.cancelled():
                continue
            try:
                await task()
            except asyncio.CancelledError:
                self._queue.appendleft((task, done))  # ``fail`` will say why
                raise
            except Exception as error:  # noqa: BLE001 - of whatever kind, whoever added the task gets it
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Fail all that wait because of ``error``."""
        while self._queue:
            done = self._queue.popleft()[1]
            if not done.cancelled():
                done.set_exception(echo_of(error))
