"""Runs coroutines in plain tests."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, Generic, TypeVar

__all__ = ["Interrupted", "happens", "run", "turns"]

T = TypeVar("T")


# Less than pytest's own limit, and so many that a busy machine does not take them.
_SECONDS = 100


def run(main: Coroutine[Any, Any, T], *, seconds: float = _SECONDS) -> T:
    """Run ``main`` on a new event loop. If it hangs, this fails with the traceback of where it hung."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await main

    return asyncio.run(bounded())


async def happens(event: threading.Event) -> None:
    """Wait for an event set by another thread, not for ever: that would keep the loop from closing."""
    assert await asyncio.to_thread(event.wait, _SECONDS), "it did not happen"


async def turns(count: int = 10) -> None:
    """Let every other task run until it waits for a thread."""
    for _ in range(count):
        await asyncio.sleep(0)


class Interrupted:
    """Wraps a coroutine function: at its suspension number ``at`` of a call, counted from 0, it calls ``then`` once.

    So something can happen at every ``await`` of the coroutine, those in what it awaits included.
    """

    def __init__(
        self, call: Callable[..., Coroutine[Any, Any, T]], at: int, then: Callable[[], None]
    ) -> None:
        self._call = call
        self._at = at
        self._then = then
        self.reached = False

    async def __call__(self, *args: Any) -> T:
        return await _Stepped(self._call(*args), self._suspended)

    def _suspended(self) -> None:
        if self._at == 0:
            self.reached = True
            self._then()
        self._at -= 1


class _Stepped(Generic[T]):
    def __init__(self, coroutine: Coroutine[Any, Any, T], suspended: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._suspended = suspended

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._coroutine.__await__()
        step: Callable[[], Any] = partial(next, steps)
        while True:
            try:
                waits_for = step()
            except StopIteration as end:
                return end.value
            self._suspended()
            try:
                yield waits_for
            except BaseException as error:  # noqa: BLE001 - passed on
                step = partial(steps.throw, error)
            else:
                step = partial(next, steps)
