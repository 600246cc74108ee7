"""Concurrent forward passes that share sweeps: each holds a layer batch while it computes with it.

The passes of a request are made by a ``PassRunner`` in a worker thread. Before a layer is called, a hook of its module
calls ``PassRunner.hold``, which asks for the layer batch and waits for it in a Future. The scheduler, a task on the
event loop, takes batches from the pipeline, hands each to the passes that wait for it, and gives it back when no pass
holds it and none *in the sweep* is expected to want it. A pass joins a sweep before its first batch is handed out;
later it waits for the next one.

A batch is: absent -> read -> transferred -> bound -> held by n passes -> unbound -> absent.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import torch

from layerstream.pipeline.modeling.binding import Binding, Bound
from layerstream.pipeline.modeling.weight_places import WeightPlace
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.scheduling.between_sweeps import BetweenSweeps
from layerstream.pipeline.scheduling.passes import PassCancelled, PassRunner
from layerstream.pipeline.scheduling.residency import Residency
from layerstream.pipeline.scheduling.route_prediction import RoutePrediction
from layerstream.pipeline.streaming.pipeline import Pipeline
from layerstream.stages.compute import Sweep
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import ClosedError, DeviceError, echo_of

__all__ = ["SweepScheduler"]

# How long the start of a sweep waits for requests between two passes: sampling takes milliseconds, and a pass that comes
# too late loses a sweep. But waiting in vain delays all others.
_PATIENCE_SECONDS = 0.005
_PATIENCE_SHARE = 0.05  # of a sweep
# Passes that compute with a batch at the same time. Measured on two cores with eight requests over warm weights: three
# at once take 0.6 of the time that one after the other takes (they share weights in the processor's caches, and one
# computes while another is in Python); eight at once take 0.55, but each has a team of torch's threads at work, and
# the event loop is delayed twice as long.
_AT_ONCE = 3


class SweepScheduler:
    """Makes the sweeps of one pipeline, and serves the passes in them.

    Args:
        pipeline: Open; only this object makes sweeps on it.
        bindings: What each layer batch puts into the module tree.
        device: Where computation runs.
        residency: Which residents a sweep has.
        always_bound: Indices of batches that are always bound; sweeps leave them out.

    Attributes:
        sweeps_begun: How many.
        passes_begun: How many.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        bindings: Sequence[Binding],
        *,
        device: Device,
        always_bound: Sequence[int],
        residency: Residency,
    ) -> None:
        self.device = device
        self.residency = residency
        self._pipeline = pipeline
        self._bindings = bindings
        self._routes = RoutePrediction(
            i for i in range(len(bindings)) if i not in set(always_bound)
        )
        self._between_sweeps = BetweenSweeps()
        self._running: set[PassRunner] = set()  # their requests have begun and not ended
        # Of those, the ones that are expected to begin a pass shortly.
        self._between_passes: set[PassRunner] = set()
        # The batch that a pass waits for, and the Future that gets it.
        self._waiting: dict[PassRunner, tuple[int, Future[Bound]]] = {}
        # For each pass in the sweep, the batches that it may still want.
        self._in_sweep: dict[PassRunner, list[int]] = {}
        # Passes that compute with the current batch, and the events behind the work of those that have done so.
        self._holders: set[PassRunner] = set()
        self._events: list[Event] = []
        self._joinable: tuple[int, ...] = ()  # the route of a sweep that passes may still join
        self._sweep_seconds = 1.0  # of the last sweep; a guess before any
        self.sweeps_begun = 0
        self.passes_begun = 0
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._error: BaseException | None = None
        self._closed = False
        self._task = asyncio.create_task(self._run(), name="layerstream-scheduler")

    # -- from the threads of passes --------------------------------------------------------------

    def call_on_loop(self, what: Callable[..., None], *args: Any) -> None:
        """Have ``what(*args)`` called on the event loop. If it may not be any more, Futures in ``args`` fail."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what, *args)
        # Checked afterwards: calls that were queued before this was set are still made.
        if self._closed or self._loop.is_closed():
            for future in args:
                if isinstance(future, Future):
                    _fail(future, ClosedError("the model was closed"))

    def absent_buffers(self, index: int) -> Mapping[WeightPlace, torch.Tensor]:
        """Placeholders for a clone's buffers while layer batch ``index`` is not there."""
        return self._bindings[index].absent_buffers()

    # -- on the event loop -----------------------------------------------------------------------

    @property
    def passes_in_sweep(self) -> int:
        """How many passes are in the sweep under way."""
        return len(self._in_sweep)

    def request_began(self, runner: PassRunner) -> None:
        """The request of ``runner`` begins, so its first pass is expected."""
        self._running.add(runner)
        self._expect_pass(runner)

    def request_ended(self, runner: PassRunner) -> None:
        """The request of ``runner`` has ended: no more passes come from it."""
        self._running.discard(runner)
        self._between_passes.discard(runner)
        self._routes.forget(runner)
        self._changed.set()

    def batch_wanted(
        self,
        runner: PassRunner,
        released: Event | None,
        index: int,
        entry: str | None,
        future: Future[Bound],
    ) -> None:
        """A pass gives back the batch that it held, and waits for another one.

        Args:
            runner: Of the pass.
            released: The event behind its work with the batch that it held, if any.
            index: Of the layer batch that it waits for.
            entry: If that is the first of the pass, the path of the module that the pass begins in.
            future: Gets the batch, or an error.
        """
        self.batch_released(runner, released)
        if self._error is not None:
            _fail(future, echo_of(self._error))
            return
        if runner.cancelled:
            future.set_exception(PassCancelled())
            return
        self._waiting[runner] = (index, future)
        if entry is not None:
            self._routes.begin(runner, entry)
            self._between_passes.discard(runner)
            self.passes_begun += 1
            if self._may_join(runner, index):
                self._in_sweep[runner] = self._route(runner)
        expected = self._in_sweep.get(runner)
        if expected is not None:
            if index in expected:
                self._in_sweep[runner] = [other for other in expected if other >= index]
            else:
                del self._in_sweep[runner]  # this sweep does not bring it: join the next one
        self._changed.set()

    def _may_join(self, runner: PassRunner, index: int) -> bool:
        """Whether ``runner`` may still join the sweep that was just begun."""
        return (
            index in self._joinable[:1]
            and set(self._route(runner)) <= set(self._joinable)
            and self.residency.allows(self._pipeline.plan, _demands({*self._running, runner}))
        )

    def batch_released(self, runner: PassRunner, released: Event | None) -> None:
        """The pass of ``runner`` has given back the batch that it held, if any; ``released`` is the event behind its work."""
        if released is not None:
            self._holders.discard(runner)
            self._events.append(released)
        self._changed.set()

    def wait_given_up(self, runner: PassRunner) -> None:
        """The pass of ``runner`` neither waits for a batch nor holds one, and wants no more in this sweep."""
        self._waiting.pop(runner, None)
        self._in_sweep.pop(runner, None)
        self._holders.discard(runner)
        self._changed.set()

    def pass_ended(
        self,
        runner: PassRunner,
        released: Event | None,
        entry: str,
        visited: tuple[int, ...] | None,
    ) -> None:
        """``runner`` has ended its pass. ``visited``: its batches, in order; None if it did not complete."""
        self.batch_released(runner, released)
        self.wait_given_up(runner)
        self._routes.end(runner)
        if runner in self._running and not runner.cancelled:
            self._expect_pass(runner)
        if visited:
            self._routes.remember(None, entry, visited)
            if runner in self._running:
                self._routes.remember(runner, entry, visited)

    def _expect_pass(self, runner: PassRunner) -> None:
        """Expect a pass of ``runner`` shortly, unless it has to wait for its turn, which may take sweeps."""
        if runner.turn is None:
            self._between_passes.add(runner)

    def cancel(self, runner: PassRunner) -> None:
        """Unwind the pass of ``runner``: at once if it waits, otherwise when it next wants a batch."""
        runner.cancelled = True
        self._between_passes.discard(runner)
        waiting = self._waiting.pop(runner, None)
        if waiting is not None:
            self._in_sweep.pop(runner, None)
            waiting[1].set_exception(PassCancelled())
            self._changed.set()

    async def _run(self) -> None:
        try:
            while True:
                await self._until(lambda: bool(self._waiting or self._between_sweeps))
                await self._between_sweeps.run()
                await self._wait_for_late_passes()
                if self._waiting:
                    await self._place_residents()
                if self._waiting:  # they may all have been cancelled while residents changed
                    await self._sweep()
        except asyncio.CancelledError:
            self._fail(ClosedError("the model was closed while it was computing"))
            raise
        except BaseException as error:  # noqa: BLE001 - every pass has to get it, none may hang
            self._fail(error)

    async def between(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run ``task`` when no sweep is under way, and raise its error if it has one."""
        if self._error is not None:
            raise echo_of(self._error)
        done = self._between_sweeps.add(task)
        self._changed.set()
        await done

    async def _place_residents(self) -> None:
        # Again after each change: a prompt that came meanwhile may need the memory that was just filled.
        while (plan := self._placement()) is not self._pipeline.plan:
            try:
                await self._pipeline.adopt(plan)
            except DeviceError as error:  # the memory is fragmented, or others have taken it
                self.residency.drop_decode_residents(error)
                return

    def _placement(self) -> Plan:
        return self.residency.plan_for(_demands({*self._running, *self._waiting}))

    async def _wait_for_late_passes(self) -> None:
        """Wait a little for requests between two passes."""
        patience = max(_PATIENCE_SECONDS, _PATIENCE_SHARE * self._sweep_seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._until(lambda: not self._between_passes or not self._waiting)
        # Those that are late are not waited for again before they have taken part in a sweep.
        self._between_passes.clear()

    async def _sweep(self) -> None:
        """Make one sweep with all passes that wait."""
        for runner in self._waiting:
            self._in_sweep[runner] = self._route(runner)
        order = tuple(sorted({index for route in self._in_sweep.values() for index in route}))
        self.sweeps_begun += 1
        started = time.perf_counter()
        async with self._pipeline.sweep(order) as sweep:
            self._joinable = order
            passes = await self._serve(sweep)
            sweep.prompt = any(number == 1 for number, _ in passes)
            sweep.tokens = passes[0][1] if len(passes) == 1 else None
            if sweep.complete:
                self.residency.swept()
                self._sweep_seconds = time.perf_counter() - started

    def _route(self, runner: PassRunner) -> list[int]:
        """The batches that ``runner``, which waits, may want from here on."""
        return self._routes.expected(runner, self._waiting[runner][0])

    async def _serve(self, sweep: Sweep) -> list[tuple[int, int | None]]:
        """Serve the batches of ``sweep`` to the passes in it.

        Returns:
            For each request, which of its passes this was, counted from 1, and the tokens in it.
        """
        passes: dict[PassRunner, tuple[int, int | None]] = {}
        try:
            while any(self._in_sweep.values()) and (batch := await sweep.receive()) is not None:
                for runner in self._in_sweep:  # now, since later it may be in its next pass
                    passes.setdefault(runner, (runner.passes, runner.tokens))
                bound = Bound(batch, self._bindings[batch.index], self.device)
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
        """Hand ``bound`` to the passes that want it, a few at a time, until no one holds it or may still want it."""
        while True:
            self._changed.clear()
            for runner, (index, future) in list(self._waiting.items()):
                if len(self._holders) >= _AT_ONCE:
                    break
                if index == bound.index and runner in self._in_sweep:
                    del self._waiting[runner]
                    self._in_sweep[runner].remove(index)
                    self._holders.add(runner)
                    future.set_result(bound)
            coming = any(bound.index in expected for expected in self._in_sweep.values())
            if not self._holders and not coming:
                return
            await self._changed.wait()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        for number, (_, future) in enumerate(self._waiting.values()):
            future.set_exception(echo_of(error) if number else error)
        self._waiting.clear()
        self._between_sweeps.fail(error)

    async def aclose(self) -> None:
        """Stop. Passes under way get a ClosedError when they next want a batch."""
        self._fail(ClosedError("the model was closed while it was computing"))
        self._closed = True
        if not self._task.done():
            # They compute with what they hold, so it must not be overwritten.
            await self._until(lambda: not self._holders)
        self._task.cancel()
        await asyncio.wait([self._task])


def _demands(runners: Iterable[PassRunner]) -> list[int | None]:
    """What the requests of these passes take beside the layers, in bytes; None for what is unknown."""
    return [runner.demand_bytes for runner in runners]


def _fail(future: Future[Any], error: BaseException) -> None:
    """Let ``future`` end with ``error``, unless it has ended."""
    with suppress(InvalidStateError):
        future.set_exception(error)
