"""Concurrent forward passes that share sweeps: each holds a layer batch while it computes with it.

A *rider* makes the forward passes of one request, in a worker thread. Before a layer is called, a hook of its module
calls ``Rider.hold``, which asks for the layer batch and waits for a *ticket*, a Future. The *conductor*, a task on the
event loop, takes batches from the pipeline, hands each to the riders that wait for it, and gives it back when no
rider holds it and none that is *aboard* is expected to want it. A rider is aboard if it takes part in the sweep under
way. It boards before the first batch is handed out; later it waits for the next sweep.

A batch is: absent -> read -> transferred -> bound -> held by n riders -> unbound -> absent.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import torch

from layerstream.pipeline.modeling.binding import Binding, Bound
from layerstream.pipeline.modeling.model_layers import Use
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.scheduling.between_sweeps import Errands
from layerstream.pipeline.scheduling.passes import PassCancelled, Rider
from layerstream.pipeline.scheduling.residency import Phases
from layerstream.pipeline.scheduling.route_prediction import PassRoutes
from layerstream.pipeline.streaming.pipeline import Pipeline
from layerstream.stages.compute import Sweep
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import ClosedError, DeviceError, echo_of

__all__ = ["Sweeps"]

# How long the start of a sweep waits for riders between two passes: sampling takes milliseconds, and a rider that comes
# too late loses a sweep. But waiting in vain delays all others.
_PATIENCE_SECONDS = 0.005
_PATIENCE_SHARE = 0.05  # of a sweep
# Riders that compute with a batch at the same time. Measured on two cores with eight requests over warm weights: three
# at once take 0.6 of the time that one after the other takes (they share weights in the processor's caches, and one
# computes while another is in Python); eight at once take 0.55, but each has a team of torch's threads at work, and
# the event loop is delayed twice as long.
_AT_ONCE = 3


class Sweeps:
    """Makes the sweeps of one pipeline, and serves the riders in them.

    Args:
        pipeline: open; only this object makes sweeps on it.
        bindings: what each layer batch puts into the module tree.
        device: where computation runs.
        phases: which residents a sweep has.
        kept: indices of batches that are always bound; sweeps leave them out.

    Attributes:
        departures: sweeps that were begun.
        passes: forward passes that were begun.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        bindings: Sequence[Binding],
        *,
        device: Device,
        kept: Sequence[int],
        phases: Phases,
    ) -> None:
        self.device = device
        self.phases = phases
        self._pipeline = pipeline
        self._bindings = bindings
        self._routes = PassRoutes(i for i in range(len(bindings)) if i not in set(kept))
        self._errands = Errands()
        self._running: set[Rider] = set()  # their requests have begun and not ended
        # Of those, the ones that are expected to begin a pass shortly.
        self._between: set[Rider] = set()
        # The batch that a rider waits for, and its ticket.
        self._waiting: dict[Rider, tuple[int, Future[Bound]]] = {}
        # For each rider aboard, the batches that it may still want.
        self._expects: dict[Rider, list[int]] = {}
        # Riders that compute with the current batch, and the events behind the work of those that have done so.
        self._holders: set[Rider] = set()
        self._events: list[Event] = []
        self._boarding: tuple[int, ...] = ()  # the route of a sweep that riders may still board
        self._sweep_seconds = 1.0  # of the last sweep; a guess before any
        self.departures = 0
        self.passes = 0
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._error: BaseException | None = None
        self._closed = False
        self._task = asyncio.create_task(self._conduct(), name="layerstream-conductor")

    # -- from the riders' threads ----------------------------------------------------------------

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        """Have ``what(*args)`` called on the event loop. If it may not be any more, Futures in ``args`` fail."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what, *args)
        # Checked afterwards: calls that were queued before this was set are still made.
        if self._closed or self._loop.is_closed():
            for ticket in args:
                if isinstance(ticket, Future):
                    _fail(ticket, ClosedError("the model was closed"))

    def absent_buffers(self, index: int) -> Mapping[Use, torch.Tensor]:
        """Placeholders for a clone's buffers while layer batch ``index`` is not there."""
        return self._bindings[index].absent_buffers()

    # -- on the event loop -----------------------------------------------------------------------

    @property
    def aboard(self) -> int:
        """How many riders are in the sweep under way."""
        return len(self._expects)

    def began(self, rider: Rider) -> None:
        """The request of ``rider`` begins, so its first pass is expected."""
        self._running.add(rider)
        self._expect(rider)

    def ended(self, rider: Rider) -> None:
        """The request of ``rider`` has ended: nothing more comes from it."""
        self._running.discard(rider)
        self._between.discard(rider)
        self._routes.forget(rider)
        self._changed.set()

    def wanted(
        self,
        rider: Rider,
        released: Event | None,
        index: int,
        entry: str | None,
        ticket: Future[Bound],
    ) -> None:
        """``rider`` gives back the batch that it held, and waits for another one.

        Args:
            rider: which.
            released: the event behind its work with the batch that it held, if any.
            index: of the layer batch that it waits for.
            entry: if that is the first of a pass, the path of the module that the pass begins in.
            ticket: gets the batch, or an error.
        """
        self.released(rider, released)
        if self._error is not None:
            _fail(ticket, echo_of(self._error))
            return
        if rider.cancelled:
            ticket.set_exception(PassCancelled())
            return
        self._waiting[rider] = (index, ticket)
        if entry is not None:
            self._routes.begin(rider, entry)
            self._between.discard(rider)
            self.passes += 1
            if self._may_board(rider, index):
                self._expects[rider] = self._route(rider)
        expected = self._expects.get(rider)
        if expected is not None:
            if index in expected:
                self._expects[rider] = [other for other in expected if other >= index]
            else:
                del self._expects[rider]  # this sweep does not bring it: board the next one
        self._changed.set()

    def _may_board(self, rider: Rider, index: int) -> bool:
        """Whether ``rider`` may still board the sweep that was just begun."""
        return (
            index in self._boarding[:1]
            and set(self._route(rider)) <= set(self._boarding)
            and self.phases.allows(self._pipeline.plan, {*self._running, rider})
        )

    def released(self, rider: Rider, released: Event | None) -> None:
        """``rider`` has given back the batch that it held, if any; ``released`` is the event behind its work."""
        if released is not None:
            self._holders.discard(rider)
            self._events.append(released)
        self._changed.set()

    def gave_up(self, rider: Rider) -> None:
        """``rider`` neither waits for a batch nor holds one, and wants no more in this sweep."""
        self._waiting.pop(rider, None)
        self._expects.pop(rider, None)
        self._holders.discard(rider)
        self._changed.set()

    def left(
        self,
        rider: Rider,
        released: Event | None,
        entry: str,
        visited: tuple[int, ...] | None,
    ) -> None:
        """``rider`` has ended its pass. ``visited``: its batches, in order; None if it did not complete."""
        self.released(rider, released)
        self.gave_up(rider)
        self._routes.end(rider)
        if rider in self._running and not rider.cancelled:
            self._expect(rider)
        if visited:
            self._routes.remember(None, entry, visited)
            if rider in self._running:
                self._routes.remember(rider, entry, visited)

    def _expect(self, rider: Rider) -> None:
        """Expect a pass of ``rider`` shortly, unless it has to wait for its turn, which may take sweeps."""
        if rider.gate is None:
            self._between.add(rider)

    def cancel(self, rider: Rider) -> None:
        """Unwind the pass of ``rider``: at once if it waits, otherwise when it next wants a batch."""
        rider.cancelled = True
        self._between.discard(rider)
        waiting = self._waiting.pop(rider, None)
        if waiting is not None:
            self._expects.pop(rider, None)
            waiting[1].set_exception(PassCancelled())
            self._changed.set()

    async def _conduct(self) -> None:
        try:
            while True:
                await self._until(lambda: bool(self._waiting or self._errands))
                await self._errands.run()
                await self._linger()
                if self._waiting:
                    await self._place_residents()
                if self._waiting:  # they may all have been cancelled while residents changed
                    await self._depart()
        except asyncio.CancelledError:
            self._fail(ClosedError("the model was closed while it was computing"))
            raise
        except BaseException as error:  # noqa: BLE001 - every rider has to get it, none may hang
            self._fail(error)

    async def between(self, errand: Callable[[], Awaitable[None]]) -> None:
        """Run ``errand`` when no sweep is under way, and raise its error if it has one."""
        if self._error is not None:
            raise echo_of(self._error)
        done = self._errands.add(errand)
        self._changed.set()
        await done

    async def _place_residents(self) -> None:
        # Again after each change: a prompt that came meanwhile may need the memory that was just filled.
        while (plan := self._placement()) is not self._pipeline.plan:
            try:
                await self._pipeline.adopt(plan)
            except DeviceError as error:  # the memory is fragmented, or others have taken it
                self.phases.give_up(error)
                return

    def _placement(self) -> Plan:
        return self.phases.plan_for({*self._running, *self._waiting})

    async def _linger(self) -> None:
        """Wait a little for riders between two passes."""
        patience = max(_PATIENCE_SECONDS, _PATIENCE_SHARE * self._sweep_seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._until(lambda: not self._between or not self._waiting)
        # Those that are late are not waited for again before they have taken part in a sweep.
        self._between.clear()

    async def _depart(self) -> None:
        """Make one sweep with all riders that wait."""
        for rider in self._waiting:
            self._expects[rider] = self._route(rider)
        order = tuple(sorted({index for route in self._expects.values() for index in route}))
        self.departures += 1
        started = time.perf_counter()
        async with self._pipeline.sweep(order) as sweep:
            self._boarding = order
            passes = await self._ride(sweep)
            sweep.prompt = any(number == 1 for number, _ in passes)
            sweep.tokens = passes[0][1] if len(passes) == 1 else None
            if sweep.complete:
                self.phases.swept()
                self._sweep_seconds = time.perf_counter() - started

    def _route(self, rider: Rider) -> list[int]:
        """The batches that ``rider``, which waits, may want from here on."""
        return self._routes.expected(rider, self._waiting[rider][0])

    async def _ride(self, sweep: Sweep) -> list[tuple[int, int | None]]:
        """Serve the batches of ``sweep`` to those aboard.

        Returns:
            For each rider, which of its passes this was, counted from 1, and the tokens in it.
        """
        passes: dict[Rider, tuple[int, int | None]] = {}
        try:
            while any(self._expects.values()) and (batch := await sweep.receive()) is not None:
                for rider in self._expects:  # now, since later it may be in its next pass
                    passes.setdefault(rider, (rider.passes, rider.tokens))
                bound = Bound(batch, self._bindings[batch.index], self.device)
                try:
                    await self._serve(bound)
                finally:
                    bound.unbind()
                self._boarding = ()
                events, self._events = tuple(self._events), []
                sweep.give_back(events)
        finally:
            self._boarding = ()
        return list(passes.values())

    async def _serve(self, bound: Bound) -> None:
        """Hand ``bound`` to the riders that want it, a few at a time, until no one holds it or may still want it."""
        while True:
            self._changed.clear()
            for rider, (index, ticket) in list(self._waiting.items()):
                if len(self._holders) >= _AT_ONCE:
                    break
                if index == bound.index and rider in self._expects:
                    del self._waiting[rider]
                    self._expects[rider].remove(index)
                    self._holders.add(rider)
                    ticket.set_result(bound)
            coming = any(bound.index in expected for expected in self._expects.values())
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
        for number, (_, ticket) in enumerate(self._waiting.values()):
            ticket.set_exception(echo_of(error) if number else error)
        self._waiting.clear()
        self._errands.fail(error)

    async def aclose(self) -> None:
        """Stop. Passes under way get a ClosedError when they next want a batch."""
        self._fail(ClosedError("the model was closed while it was computing"))
        self._closed = True
        if not self._task.done():
            # They compute with what they hold, so it must not be overwritten.
            await self._until(lambda: not self._holders)
        self._task.cancel()
        await asyncio.wait([self._task])


def _fail(ticket: Future[Any], error: BaseException) -> None:
    """Let ``ticket`` end with ``error``, unless it has ended."""
    with suppress(InvalidStateError):
        ticket.set_exception(error)
