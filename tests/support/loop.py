"""Coroutines in plain tests."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run", "turns"]

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, seconds: float = 30) -> T:
    """Run ``main`` on a loop of its own. What hangs fails, with the traceback of where it hung."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await main

    return asyncio.run(bounded())


async def turns(count: int = 10) -> None:
    """Let every other task run as far as it gets without waiting for a thread."""
    for _ in range(count):
        await asyncio.sleep(0)
