"""The task that makes sweeps, one after the other, each for all passes that wait.

When a pass joins a sweep, and what it gets in it: see ``pass_states``.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch

from layerstream.pipeline.modeling.binding import Binding, Bound
from layerstream.pipeline.modeling.weight_places import WeightPlace
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.scheduling.between_sweeps import BetweenSweeps
from layerstream.pipeline.scheduling.out_of_memory import OutOfMemory, first_line
from layerstream.pipeline.scheduling.pass_state import PassPhase, fail_future
from layerstream.pipeline.scheduling.pass_states import PassStates
from layerstream.pipeline.scheduling.passes import PassRunner
from layerstream.pipeline.scheduling.residency import Residency
from layerstream.pipeline.streaming.pipeline import Pipeline
from layerstream.stages.compute import Sweep
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import ClosedError, DeviceError, LayerstreamError, copy_of, echo_of

__all__ = ["SweepScheduler"]

# How long the start of a sweep waits for requests between two passes: sampling takes milliseconds, and a pass that
# comes too late loses a sweep. But waiting for nothing delays all others.
_PATIENCE_SECONDS = 0.005
_PATIENCE_SHARE = 0.05  # of a sweep


class SweepScheduler(PassStates):
    """Makes the sweeps of one pipeline, and serves the passes in them.

    Args:
        pipeline: Open; only this object makes sweeps on it.
        bindings: What each layer batch puts into the module tree.
        device: Where computation runs.
        residency: Which layers are resident in a sweep.
        always_bound: Indices of batches that are always bound; sweeps leave them out.
        reopened_within_seconds: How long passes wait after a failure, counted from the first one in a row.

    Attributes:
        pipeline: The one that sweeps are made on.
        failure: The error that has ended sweeps until ``resume``.
        reopened: How many times they were resumed.
        out_of_memory: What to do if a stage had no memory; None: fail the passes.
        sweeps_begun: Sweeps begun so far.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        bindings: Sequence[Binding],
        *,
        device: Device,
        always_bound: Sequence[int],
        residency: Residency,
        reopened_within_seconds: float,
    ) -> None:
        super().__init__(
            (index for index in range(len(bindings)) if index not in set(always_bound)),
            fits=lambda demands: self.residency.allows(self.pipeline.plan, demands),
        )
        self.device = device
        self.residency = residency
        self.pipeline = pipeline
        self._bindings = bindings
        self._between_sweeps = BetweenSweeps()
        self._sweep_seconds = 1.0  # of the last sweep; a guess before any
        self.sweeps_begun = 0
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._reopened_within_seconds = reopened_within_seconds
        self._waiting_fails: asyncio.TimerHandle | None = None
        self._failed_seconds: float | None = None  # since when no sweep was completed
        self.failure: BaseException | None = None
        self.reopened = 0
        self.out_of_memory: OutOfMemory | None = None
        self._relief: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._run(), name="layerstream-scheduler")

    # -- from the threads of passes --------------------------------------------------------------

    def call_on_loop(self, what: Callable[..., None], *args: Any) -> None:
        """Have ``what(*args)`` called on the event loop. If the scheduler is closed, Futures in ``args`` fail."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what, *args)
        # Checked afterwards: calls that were queued before this was set are still made.
        if self._closed or self._loop.is_closed():
            for future in args:
                if isinstance(future, Future):
                    fail_future(future, ClosedError("the model was closed"))

    def absent_buffers(self, index: int) -> Mapping[WeightPlace, torch.Tensor]:
        """Placeholders for a clone's buffers while layer batch ``index`` is not there."""
        return self._bindings[index].absent_buffers()

    def check(self) -> None:
        """Raise the error that has ended all sweeps, if there was one. May be called in any thread."""
        error = self._error or self.failure
        if error is not None:
            raise echo_of(error)

    # -- on the event loop -----------------------------------------------------------------------

    async def between(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run ``task`` when no sweep is under way, and raise its error if it has one."""
        self.check()
        done = self._between_sweeps.add(task)
        self._changed.set()
        await done

    async def _run(self) -> None:
        try:
            while True:
                await self._until(lambda: self._has_waiting() or bool(self._between_sweeps))
                await self._between_sweeps.run()
                await self._wait_for_late_passes()
                if self._has_waiting():
                    await self._place_residents()
                if self._has_waiting():  # they may all have been cancelled while residents changed
                    await self._sweep()
        except asyncio.CancelledError:
            self._fail(ClosedError("the model was closed while it was computing"))
            raise
        except BaseException as error:  # noqa: BLE001 - every pass has to get it, none may hang
            self._stop_sweeps(error)

    def _stop_sweeps(self, error: BaseException) -> None:
        """Make no more sweeps until ``resume``, for which passes wait for as long as they may."""
        self.failure = copy_of(error)
        self._between_sweeps.fail(self.failure)
        now, is_first = self._loop.time(), self._failed_seconds is None
        self._failed_seconds = since = self._failed_seconds or now
        left = since + self._reopened_within_seconds - now
        if isinstance(error, torch.OutOfMemoryError) and self.out_of_memory is not None:
            self._relief = asyncio.create_task(self._relieve(self.out_of_memory, is_first))
            return
        # A disk may work again. Files that have changed, or a device that has failed, will not.
        if left > 0 and isinstance(error.__cause__, OSError):
            self._waiting_fails = self._loop.call_later(left, self._fail_waiting, self.failure)
        else:
            self._fail_waiting(error)

    async def _relieve(self, out_of_memory: OutOfMemory, is_first: bool) -> None:
        """Have the pipeline opened anew with a smaller plan, which resumes sweeps; once in a row."""
        failure = self.failure or DeviceError()
        try:
            what = first_line(failure)
            if not is_first:
                raise out_of_memory.error(what, "was so with a larger plan")
            await out_of_memory.relieve(what)
        except LayerstreamError as error:
            if self.failure is failure:  # not reopened meanwhile
                self._fail_waiting(error)

    def resume(self, pipeline: Pipeline) -> None:
        """Go on with ``pipeline`` after ``failure``, with the passes that still wait.

        Raises:
            ClosedError: The scheduler is closed.
        """
        if self._waiting_fails is not None:
            self._waiting_fails.cancel()
        if self._closed:
            raise ClosedError("the model was closed while it was being reopened")
        self.failure = self._error = self._waiting_fails = None
        self.reopened += 1
        self.go_on_with(pipeline)
        self._task = asyncio.create_task(self._run(), name="layerstream-scheduler")

    def go_on_with(self, pipeline: Pipeline) -> None:
        """Take the next sweeps from ``pipeline``. To be called between two sweeps; passes that wait join the next one."""
        self.pipeline = pipeline
        for state in self._states.values():
            state.route = None
        self._events.clear()

    def _has_waiting(self) -> bool:
        return bool(self._in(PassPhase.WAITING))

    async def _wait_for_late_passes(self) -> None:
        """Wait a little for requests between two passes."""
        patience = max(_PATIENCE_SECONDS, _PATIENCE_SHARE * self._sweep_seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._until(
                    lambda: not self._in(PassPhase.EXPECTED) or not self._has_waiting()
                )
        # Those that are late are not waited for again before they have taken part in a sweep.
        for state in self._in(PassPhase.EXPECTED):
            state.expect_no_more()

    async def _place_residents(self) -> None:
        """Have the residents that the waiting passes leave memory for."""
        # Again after each change: a prompt that came meanwhile may need the memory that was just filled.
        while (plan := self._placement()) is not self.pipeline.plan:
            try:
                await self.pipeline.adopt(plan)
            except DeviceError as error:  # the memory is fragmented, or others have taken it
                self.residency.refused(plan, error, instead=self.pipeline.plan)

    def _placement(self) -> Plan:
        return self.residency.plan_for(self._demands())

    async def _sweep(self) -> None:
        """Make one sweep with all passes that wait."""
        order = self._join_sweep()
        self.sweeps_begun += 1
        started = time.perf_counter()
        async with self.pipeline.sweep(order) as sweep:
            self._joinable = order
            passes = await self._serve(sweep)
            sweep.prompt = any(number == 1 for number, _ in passes)
            sweep.tokens = passes[0][1] if len(passes) == 1 else None
            if sweep.complete:
                self._failed_seconds = None
                self.residency.first_sweep_ended()
                self._sweep_seconds = time.perf_counter() - started

    async def _serve(self, sweep: Sweep) -> list[tuple[int, int | None]]:
        """Serve the batches of ``sweep`` to the passes in it.

        Returns:
            For each request, which of its passes this was, counted from 1, and the tokens in it.
        """
        passes: dict[PassRunner, tuple[int, int | None]] = {}
        try:
            while any(route for _, route in self._in_sweep()):
                batch = await sweep.receive()
                if batch is None:
                    break
                for runner, _ in self._in_sweep():  # now, since later it may be in its next pass
                    passes.setdefault(runner, (runner.passes, runner.tokens))
                bound = Bound(
                    batch, self._bindings[batch.index], self.device, passes=self.passes_in_sweep
                )
                try:
                    await self._serve_batch(bound)
                finally:
                    bound.unbind()
                self._joinable = ()
                events, self._events = tuple(self._events), []
                sweep.give_back(events)
        finally:
            self._joinable = ()
        return list(passes.values())

    async def _serve_batch(self, bound: Bound) -> None:
        """Hand ``bound`` to the passes that want it, until none holds it or may still want it."""
        while True:
            self._changed.clear()
            if not self._hand_out(bound):
                return
            await self._changed.wait()

    async def stop(self, error: BaseException) -> None:
        """Make no more sweeps until ``resume``; ``error`` fails all passes: what they compute is of no use."""
        self._error = None  # of an earlier failure, which has passed or not
        self._fail(error)
        await self._end_sweeps()
        self.failure = copy_of(error)

    async def _end_sweeps(self) -> None:
        if not self._task.done():
            # Passes compute with the batches they hold, which must not be overwritten.
            await self._until(lambda: not self._is_held())
        self._task.cancel()
        await asyncio.wait([self._task])

    def _fail(self, error: BaseException) -> None:
        self._fail_waiting(error)
        self._between_sweeps.fail(copy_of(error))

    def abandon(self, _error: Callable[[], BaseException]) -> bool:
        """Wait no more for passes that hold layer batches, which hang in page faults. What they compute with is mapped, and stays."""

        def give_up() -> None:
            for state in self._states.values():
                state.release()
            self._changed.set()

        self.call_on_loop(give_up)
        return False  # nothing is told of it: the threads of the passes are given up as well

    async def aclose(self) -> None:
        """Stop. Passes under way get a ClosedError when they next want a batch."""
        self._fail(ClosedError("the model was closed while it was computing"))
        self._closed = True
        if self._waiting_fails is not None:
            self._waiting_fails.cancel()
        if self._relief is not None:
            await asyncio.wait([self._relief])
        await self._end_sweeps()
