"""Forward passes that ride sweeps: weights go round, and a pass holds each layer batch while it computes.

A pass runs in a worker thread. The hooks of the layers' modules call ``Rider.hold``; the conductor, a task
on the event loop, takes batches from the pipeline, hands each to the riders that want it, and gives it back
when no rider holds it and none that is aboard still wants it.

A batch is: absent -> read -> transferred -> bound -> held by n riders -> unbound -> absent.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import torch

from layerstream.pipeline.binding import Binding, Bound
from layerstream.pipeline.modules import Use
from layerstream.pipeline.phases import Phases
from layerstream.pipeline.pipeline import Pipeline
from layerstream.pipeline.plan import Plan
from layerstream.pipeline.rider import PassCancelled, Rider
from layerstream.stages.compute import Sweep
from layerstream.stages.devices import Device, Event
from layerstream.stages.errors import ClosedError, DeviceError

__all__ = ["Sweeps"]

# A departure waits at most so long for riders that are between two steps: sampling takes milliseconds, and
# who misses it loses a sweep. But what is waited for in vain is lost to all who are aboard.
_PATIENCE_SECONDS = 0.005
_PATIENCE_SHARE = 0.05  # of a sweep
# Riders that compute with a batch at the same time. Measured on two cores with eight requests over warm weights,
# in turn 1.0: three at once take 0.6 of the time (what one has brought into the processor's caches serves the
# others, and one computes while another is in Python), eight take 0.55, but then each of them has a team of
# torch's threads at work, and the event loop's heartbeat comes twice as late.
_AT_ONCE = 3


class Sweeps:
    """The conductor of all forward passes on one pipeline.

    Args:
        pipeline: open; nobody else asks it for sweeps.
        bindings: what each layer batch puts into the module tree.
        device: where computation runs.
        phases: which residents a sweep has.
        kept: indices of batches that are bound for good; they are on no route.
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
        self._all = tuple(i for i in range(len(bindings)) if i not in set(kept))
        # What the last pass from an entry visited: a rider's own, and anybody's.
        self._routes: dict[tuple[Rider | None, str], tuple[int, ...]] = {}
        self._waiting: dict[Rider, tuple[int, Future[Bound]]] = {}
        self._expects: dict[Rider, list[int]] = {}  # what each rider aboard may still want
        self._entries: dict[Rider, str] = {}
        self._holders: set[Rider] = set()
        self._errands: deque[tuple[Callable[[], Awaitable[None]], asyncio.Future[None]]] = deque()
        self._running: set[Rider] = set()  # whose requests have begun and not ended
        # Those of them that will want the first batch of a sweep shortly.
        self._between: set[Rider] = set()
        # The route of a sweep whose first batch is still to come.
        self._boarding: tuple[int, ...] = ()
        self._sweep_seconds = 1.0  # of the last one; before any, a guess
        self.departures = 0
        self.passes = 0
        self._events: list[Event] = []
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._error: BaseException | None = None
        self._closed = False
        self._task = asyncio.create_task(self._conduct(), name="layerstream-conductor")

    # -- from the riders' threads ----------------------------------------------------------------

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        """Have ``what(*args)`` called on the event loop; once that may be over, no Future in ``args`` stays open."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what, *args)
        # Looked at afterwards: what came before it was set, the loop still does.
        if self._closed or self._loop.is_closed():
            for ticket in args:
                if isinstance(ticket, Future):
                    _fail(ticket, ClosedError("the model was closed"))

    def absent_buffers(self, index: int) -> Mapping[Use, torch.Tensor]:
        """What stands in a clone's buffers while layer batch ``index`` is not there."""
        return self._bindings[index].absent_buffers()

    # -- on the event loop -----------------------------------------------------------------------

    @property
    def aboard(self) -> int:
        """How many riders are in the sweep under way."""
        return len(self._expects)

    def began(self, rider: Rider) -> None:
        """The request of ``rider`` begins: its first pass is to be expected."""
        self._running.add(rider)
        self._expect(rider)

    def ended(self, rider: Rider) -> None:
        """The request of ``rider`` has ended: nothing more comes from it."""
        self._running.discard(rider)
        self._between.discard(rider)
        for key in [key for key in self._routes if key[0] is rider]:
            del self._routes[key]
        self._changed.set()

    def wanted(
        self,
        rider: Rider,
        released: Event | None,
        index: int,
        entry: str | None,
        ticket: Future[Bound],
    ) -> None:
        """``rider`` waits for layer batch ``index``; with ``entry``, it is the first of a pass."""
        self.released(rider, released)
        if self._error is not None:
            _fail(ticket, _echo(self._error))
            return
        if rider.cancelled:
            ticket.set_exception(PassCancelled())
            return
        self._waiting[rider] = (index, ticket)
        if entry is not None:
            self._entries[rider] = entry
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
        """Whether ``rider`` may still join the sweep that has just departed."""
        return (
            index in self._boarding[:1]
            and set(self._route(rider)) <= set(self._boarding)
            and self.phases.allows(self._pipeline.plan, {*self._running, rider})
        )

    def released(self, rider: Rider, released: Event | None) -> None:
        """``rider`` gives no more work that reads the batch it held; ``released`` is the last of it."""
        if released is not None:
            self._holders.discard(rider)
            self._events.append(released)
        self._changed.set()

    def gave_up(self, rider: Rider) -> None:
        """``rider`` neither waits for a batch nor holds one."""
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
        """``rider`` has ended its pass, having visited these batches if it got to its end."""
        self.released(rider, released)
        self.gave_up(rider)
        self._entries.pop(rider, None)
        if rider in self._running and not rider.cancelled:
            self._expect(rider)
        if visited:
            self._routes[None, entry] = visited
            if rider in self._running:
                self._routes[rider, entry] = visited

    def _expect(self, rider: Rider) -> None:
        """A pass of ``rider`` comes shortly, unless that has to wait for its turn, which may take sweeps."""
        if rider.gate is None:
            self._between.add(rider)

    def cancel(self, rider: Rider) -> None:
        """Unwind the pass of ``rider``: at once if it waits, else where it next wants a batch."""
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
                await self._run_errands()
                await self._linger()
                if self._waiting:
                    await self._place_residents()
                if self._waiting:  # they may all have been cancelled while residents changed places
                    await self._depart()
        except asyncio.CancelledError:
            self._fail(ClosedError("the model was closed while it was computing"))
            raise
        except BaseException as error:  # noqa: BLE001 - every rider has to hear of it, none may hang
            self._fail(error)

    async def between(self, errand: Callable[[], Awaitable[None]]) -> None:
        """Have ``errand`` done while no sweep is under way; an error of it is the caller's."""
        if self._error is not None:
            raise _echo(self._error)
        done: asyncio.Future[None] = self._loop.create_future()
        self._errands.append((errand, done))
        self._changed.set()
        await done

    async def _run_errands(self) -> None:
        while self._errands:
            errand, done = self._errands.popleft()
            if done.cancelled():
                continue
            try:
                await errand()
            except asyncio.CancelledError:
                self._errands.appendleft((errand, done))  # whoever waits for it hears why
                raise
            except Exception as error:  # noqa: BLE001 - of whatever kind, it is the caller's
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(None)

    async def _place_residents(self) -> None:
        # Once more after each change: a prompt that came meanwhile may need the room that was just filled.
        while (plan := self._placement()) is not self._pipeline.plan:
            try:
                await self._pipeline.adopt(plan)
            # What was planned to be free is in pieces, or somebody else's.
            except DeviceError as error:
                self.phases.give_up(error)
                return

    def _placement(self) -> Plan:
        return self.phases.plan_for({*self._running, *self._waiting})

    async def _linger(self) -> None:
        """Wait a little for those between two steps; who is late takes the next sweep."""
        patience = max(_PATIENCE_SECONDS, _PATIENCE_SHARE * self._sweep_seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._until(lambda: not self._between or not self._waiting)
        # Who was late once is not waited for again before it has caught a sweep.
        self._between.clear()

    async def _depart(self) -> None:
        """One sweep, with all who wait."""
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
        """What ``rider``, who waits, may want from where it is."""
        index, _ = self._waiting[rider]
        entry = self._entries[rider]
        route = self._routes.get((rider, entry)) or self._routes.get((None, entry), self._all)
        return sorted({index, *(other for other in route if other > index)})

    async def _ride(self, sweep: Sweep) -> list[tuple[int, int | None]]:
        """Bring the batches of ``sweep`` to those aboard; returns which pass of its each made, and its tokens."""
        passes: dict[Rider, tuple[int, int | None]] = {}
        try:
            while any(self._expects.values()) and (batch := await sweep.receive()) is not None:
                for rider in self._expects:  # before it is in the next one
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
        """Hand ``bound`` to whoever wants it, a few at a time, until nobody holds it or may still come for it."""
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
            ticket.set_exception(_echo(error) if number else error)
        self._waiting.clear()
        while self._errands:
            done = self._errands.popleft()[1]
            if not done.cancelled():
                done.set_exception(_echo(error))

    async def aclose(self) -> None:
        """Stop; passes under way get a ClosedError where they next want a batch."""
        self._fail(ClosedError("the model was closed while it was computing"))
        self._closed = True
        if not self._task.done():
            # Until then, what they hold may not be written: they compute with it.
            await self._until(lambda: not self._holders)
        self._task.cancel()
        await asyncio.wait([self._task])


def _fail(ticket: Future[Any], error: BaseException) -> None:
    """Let ``ticket`` end with ``error``, unless it has ended."""
    with suppress(InvalidStateError):
        ticket.set_exception(error)


def _echo(error: BaseException) -> ClosedError:
    """For all but the first who hears of ``error``: one exception raised again and again collects tracebacks."""
    if isinstance(error, ClosedError):
        return ClosedError(*error.args)
    echo = ClosedError(f"streaming has failed before: {error}")
    echo.__cause__ = error
    return echo
