"""How late the event loop is: what it does for one client must not delay the others."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["LoopLag", "prompt_loop"]

# Short beside what a reader of a stream notices, long beside what the measurement takes.
_INTERVAL_SECONDS = 0.005

# How long a thread that runs Python may keep the interpreter while others want it. With Python's 5 ms, the loop waits as
# long for each of the threads in which requests are computed. Measured beside four such threads on two busy cores: the
# median of its lag was 31 to 628 ms, and with this 9 to 16; the threads did as much in a second of processor time.
_SWITCH_SECONDS = 0.0005


@contextmanager
def prompt_loop() -> Iterator[None]:
    """Let the event loop have the interpreter soon during the block, though other threads run Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


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
