"""Ends tasks with their event loop, also if that is merely closed."""

import asyncio
import logging
import os
import weakref
from typing import Any

__all__ = ["end_with_loop"]

logger = logging.getLogger(__name__)

# The tasks of each loop whose ``close`` is ours.
_tasks: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.WeakSet[asyncio.Task[Any]]]"
_tasks = weakref.WeakKeyDictionary()


def end_with_loop(task: asyncio.Task[Any]) -> None:
    """Have ``task`` cancelled, and waited for, when its event loop is closed.

    ``asyncio.run`` does so with all tasks. But ``loop.close()`` alone leaves them where they are, for ever, with the threads,
    files and memory that they would have released.
    """
    loop = task.get_loop()
    if loop not in _tasks:
        _tasks[loop] = weakref.WeakSet()
        _let_close_end_tasks(loop)
    _tasks[loop].add(task)


def _let_close_end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    closes, tasks, process = loop.close, _tasks[loop], os.getpid()

    def close() -> None:
        left = [task for task in tasks if not task.done()]
        try:
            # Not in a fork, which has none of the threads; nor inside of another loop, which cannot run this one.
            if left and os.getpid() == process and not loop.is_closed() and not _in_loop():
                for task in left:
                    task.cancel()
                loop.run_until_complete(_wait(left))
        finally:
            closes()

    # Loops have no other place for what has to precede their end.
    loop.close = close  # type: ignore[method-assign]


def _in_loop() -> bool:
    return asyncio._get_running_loop() is not None  # noqa: SLF001 - the public one raises


async def _wait(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)
