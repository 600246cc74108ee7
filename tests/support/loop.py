"""Runs coroutines in plain tests."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["happens", "run", "turns"]

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, seconds: float = 30) -> T:
    """Run ``main`` on a new event loop. If it hangs, this fails with the traceback of where it hung."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await main

    return asyncio.run(bounded())


async def happens(event: threading.Event) -> None:
    """Wait for an event set by another thread, not for ever: that would keep the loop from closing."""
    assert await asyncio.to_thread(event.wait, 20), "it did not happen"


async def turns(count: int = 10) -> None:
    """Let every other task run until it waits for a thread."""
    for _ in range(count):
        await asyncio.sleep(0)
