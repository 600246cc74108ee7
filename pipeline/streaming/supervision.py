"""Runs the stages as tasks, and passes the error of one of them to the caller."""

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from layerstream.stages.channel import Channel
from layerstream.stages.errors import ClosedError
from layerstream.stages.route import InFlight

__all__ = ["run_stages"]


async def run_stages(
    *stages: Coroutine[Any, Any, None],
    ready: Channel[InFlight],
    interrupt: Callable[[], None],
) -> None:
    """Run ``stages`` until one of them fails, which ends the others, or until this is cancelled.

    Args:
        stages: Each runs until it is cancelled or fails.
        ready: The channel from which computation gets its batches; closed with the error, or else with a ClosedError.
        interrupt: Makes the stages' threads return if they only wait.
    """

    async def run(stage: Coroutine[Any, Any, None]) -> None:
        try:
            await stage
        except BaseExceptionGroup as group:
            _forget_locals(group)
            if not ready.closed:  # otherwise this is a consequence of an earlier error
                # Now, since the other stages end only when their threads have finished their calls.
                _close(ready, group)
                interrupt()
        raise _StageFailed

    try:
        async with asyncio.TaskGroup() as tasks:
            for stage in stages:
                tasks.create_task(run(stage))
    except BaseExceptionGroup as group:  # the caller gets the error from ``ready``
        _forget_locals(group)
    finally:
        ready.close(ClosedError("the pipeline was closed"))


class _StageFailed(Exception):  # noqa: N818 - ends the other stages, and reaches nobody
    pass


def _close(ready: Channel[InFlight], group: BaseExceptionGroup[BaseException]) -> None:
    error = _first_error(group)
    _forget_locals(error)
    ready.close(error)


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that came first; the others in ``group`` are its consequences."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _forget_locals(error: BaseException | None) -> None:
    """Drop the local variables in the traceback of ``error``.

    They are views of slots, which would keep an arena mapped, and errors, which would keep themselves.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
