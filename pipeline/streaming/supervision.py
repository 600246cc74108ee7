"""Starts the stages, runs them as tasks, and passes the error of one of them to the caller."""

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.streaming.resources import Resources
from layerstream.stages.channel import Channel
from layerstream.stages.errors import ClosedError
from layerstream.stages.read import read_stage
from layerstream.stages.route import InFlight, Route
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.transfer import transfer_stage

__all__ = ["start_stages"]

# One batch ready behind each stage absorbs jitter. The arenas bound how many are under way.
_QUEUE_SIZE = 1


def start_stages(
    plan: Plan, resources: Resources, read_clock: Clock, transfer_clock: Clock
) -> tuple[Route, Channel[InFlight], asyncio.Task[None]]:
    """Start reading and transferring the batches of ``plan``.

    Returns:
        What decides which batch is next, the channel from which computation gets them, and the task of the stages.
    """
    host_arena, device_arena = resources.arenas
    route = Route(plan.batches, resources.residents)
    arrived: Channel[InFlight] = Channel(_QUEUE_SIZE)
    ready: Channel[InFlight] = Channel(_QUEUE_SIZE)
    reading = read_stage(
        route=route,
        reader=resources.reader,
        mapped=resources.mapped,
        arena=host_arena,
        residents=resources.residents,
        threads=resources.read_threads,
        request_bytes=plan.read_request_bytes,
        out=arrived,
        clock=read_clock,
    )
    transferring = transfer_stage(
        route=route,
        source=arrived,
        device=resources.device,
        arena=device_arena,
        residents=resources.residents,
        threads=resources.transfer_threads,
        out=ready,
        clock=transfer_clock,
    )
    stages = _run_stages(reading, transferring, ready=ready, interrupt=resources.reader.interrupt)
    return route, ready, asyncio.create_task(stages, name="layerstream-stages")


async def _run_stages(
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
