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
            if not ready.closed:  # otherwise this is a consequence of an earlier error
                error = _first_error(group)
                _forget_locals(error)
                # Now, since the other stages end only when their threads have finished their calls.
                ready.close(error)
                interrupt()
            raise

    try:
        async with asyncio.TaskGroup() as tasks:
            for stage in stages:
                tasks.create_task(run(stage))
    except BaseExceptionGroup:
        pass  # the caller gets the error from ``ready``
    finally:
        ready.close(ClosedError("the pipeline was closed"))


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that came first; the others in ``group`` are its consequences."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _forget_locals(error: BaseException | None) -> None:
    """Drop the local variables in the traceback of ``error``: views of slots, which would keep an arena mapped."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
