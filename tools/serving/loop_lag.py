"""How late the event loop is: what it does for one client must not delay the others."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["LoopLag"]

# Short beside what a reader of a stream notices, long beside what the measurement takes.
_INTERVAL_SECONDS = 0.005


class LoopLag:
    """Measures how late the running loop wakes a task that has slept, as long as it has something to do.

    Args:
        observe: Called with the seconds of each measurement.
    """

    def __init__(self, observe: Callable[[float], object]) -> None:
        self._observe = observe
        self._users = 0
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure while the block, or another one of them, runs."""
        self._users += 1
        if self._task is None:
            self._task = asyncio.create_task(self._measure())
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._task.cancel()
                self._task = None

    async def _measure(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _INTERVAL_SECONDS
            await asyncio.sleep(_INTERVAL_SECONDS)
            self._observe(max(0.0, loop.time() - due))
