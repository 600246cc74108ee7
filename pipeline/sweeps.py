"""Forward passes that ride sweeps: weights go round, and a pass holds each layer batch while it computes.

A pass runs in a worker thread. The hooks of the layers' modules call ``Rider.hold``; the conductor, a task
on the event loop, takes batches from the pipeline, hands each to the riders that want it, and gives it back
when no rider holds it and none that is aboard still wants it.

A batch is: absent -> read -> transferred -> bound -> held by n riders -> unbound -> absent.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from layerstream.pipeline.binding import Binding, Bound
from layerstream.pipeline.modules import Use
from layerstream.pipeline.pipeline import Pipeline
from layerstream.pipeline.rider import PassCancelled, Rider
from layerstream.stages.compute import Sweep
from layerstream.stages.devices import Device, Event
from layerstream.stages.errors import ClosedError, ModelError

__all__ = ["Sweeps"]


class Sweeps:
    """The conductor of all forward passes on one pipeline.

    Args:
        pipeline: open; nobody else asks it for sweeps.
        root: the module tree, with hooks on it that call ``enter``, ``hold`` and ``leave``.
        bindings: what each layer batch puts into the module tree.
        device: where computation runs.
        kept: indices of batches that are bound for good; they are on no route.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        root: torch.nn.Module,
        bindings: Sequence[Binding],
        *,
        device: Device,
        kept: Sequence[int],
    ) -> None:
        self.device = device
        self._pipeline = pipeline
        self._bindings = bindings
        self._all = tuple(i for i in range(len(bindings)) if i not in set(kept))
        self._routes: dict[str, tuple[int, ...]] = {}  # what the last pass from an entry visited
        self._waiting: dict[Rider, tuple[int, Future[Bound]]] = {}
        self._expects: dict[Rider, list[int]] = {}  # what each rider aboard may still want
        self._entries: dict[Rider, str] = {}
        self._holders: set[Rider] = set()
        self._events: list[Event] = []
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._local = threading.local()
        self._root = root
        self._turn = threading.Lock()
        self._error: BaseException | None = None
        self._task = asyncio.create_task(self._conduct(), name="layerstream-conductor")

    # -- from the riders' threads ----------------------------------------------------------------

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        """Have ``what(*args)`` called on the event loop."""
        try:
            self._loop.call_soon_threadsafe(what, *args)
        except RuntimeError:  # the loop is closed, and with it the pipeline
            for ticket in args:
                if isinstance(ticket, Future):
                    ticket.set_exception(ClosedError("the model was closed"))

    @contextmanager
    def riding(self, rider: Rider) -> Iterator[None]:
        """Let the forward passes of the calling thread be those of ``rider``."""
        self._local.rider = rider
        try:
            yield
        finally:
            del self._local.rider

    def rider(self) -> Rider:
        """Whose pass the calling thread is in.

        A thread that was not given a rider calls the module tree itself, not a clone: all such threads
        share its buffers, so their passes go one after the other.
        """
        rider = self.current()
        if rider is None:
            if threading.get_ident() == self._loop_thread:
                raise ModelError(
                    "the streamed module was called on the event loop, which feeds it; await the StreamedModel's "
                    "forward or generate instead, or call the module in a thread"
                )
            rider = self._local.rider = Rider(self, turn=self._turn)
            rider.root = self._root
        return rider

    def current(self) -> Rider | None:
        """The rider of the calling thread, if it has one."""
        return getattr(self._local, "rider", None)

    def absent_buffers(self, index: int) -> Mapping[Use, torch.Tensor]:
        """What stands in a clone's buffers while layer batch ``index`` is not there."""
        return self._bindings[index].absent_buffers()

    # -- on the event loop -----------------------------------------------------------------------

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
            ticket.set_exception(_echo(self._error))
            return
        if rider.cancelled:
            ticket.set_exception(PassCancelled())
            return
        if entry is not None:
            self._entries[rider] = entry
        self._waiting[rider] = (index, ticket)
        expected = self._expects.get(rider)
        if expected is not None:
            if index in expected:
                self._expects[rider] = [other for other in expected if other >= index]
            else:
                del self._expects[rider]  # this sweep does not bring it: board the next one
        self._changed.set()

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
        if visited:
            self._routes[entry] = visited

    def cancel(self, rider: Rider) -> None:
        """Unwind the pass of ``rider``: at once if it waits, else where it next wants a batch."""
        rider.cancelled = True
        waiting = self._waiting.pop(rider, None)
        if waiting is not None:
            self._expects.pop(rider, None)
            waiting[1].set_exception(PassCancelled())
            self._changed.set()

    async def _conduct(self) -> None:
        try:
            while True:
                await self._until(lambda: bool(self._waiting))
                order = self._board()
                async with self._pipeline.sweep(order) as sweep:
                    await self._ride(sweep)
        except asyncio.CancelledError:
            self._fail(ClosedError("the model was closed while it was computing"))
            raise
        except BaseException as error:  # noqa: BLE001 - every rider has to hear of it, none may hang
            self._fail(error)

    def _board(self) -> tuple[int, ...]:
        """Take all who wait aboard; returns the route: all that any of them may want."""
        for rider, (index, _) in self._waiting.items():
            route = self._routes.get(self._entries[rider], self._all)
            self._expects[rider] = sorted({index, *(other for other in route if other > index)})
        return tuple(sorted({index for route in self._expects.values() for index in route}))

    async def _ride(self, sweep: Sweep) -> None:
        while any(self._expects.values()) and (batch := await sweep.receive()) is not None:
            bound = Bound(batch, self._bindings[batch.index], self.device)
            try:
                await self._serve(bound)
            finally:
                bound.unbind()
            events, self._events = tuple(self._events), []
            sweep.give_back(events)

    async def _serve(self, bound: Bound) -> None:
        """Hand ``bound`` to whoever wants it, until nobody holds it or may still come for it."""
        while True:
            self._changed.clear()
            for rider, (index, ticket) in list(self._waiting.items()):
                if index == bound.index and rider in self._expects:
                    del self._waiting[rider]
                    self._expects[rider].remove(index)
                    self._holders.add(rider)
                    ticket.set_result(bound)
            coming = any(
                bound.index in expected and rider not in self._waiting
                for rider, expected in self._expects.items()
            )
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

    async def aclose(self) -> None:
        """Stop; passes under way get a ClosedError where they next want a batch."""
        self._fail(ClosedError("the model was closed while it was computing"))
        if not self._task.done():
            # Until then, what they hold may not be written: they compute with it.
            await self._until(lambda: not self._holders)
        self._task.cancel()
        await asyncio.wait([self._task])


def _echo(error: BaseException) -> ClosedError:
    """For all but the first who hears of ``error``: one exception raised again and again collects tracebacks."""
    if isinstance(error, ClosedError):
        return ClosedError(*error.args)
    echo = ClosedError(f"streaming has failed before: {error}")
    echo.__cause__ = error
    return echo
