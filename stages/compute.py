"""The compute stage: device slot -> the caller's computation."""

import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import Self

import torch

from layerstream.stages.batch import Place
from layerstream.stages.channel import Channel
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import ClosedError
from layerstream.stages.route import InFlight, Route
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import Activity

__all__ = ["Batch", "Handover", "Sweep"]


class Batch:
    """A layer batch that has arrived. Its tensors are valid until it is given back.

    Attributes:
        index: Place in execution order, from 0.
        layers: The names of its layers.
    """

    def __init__(self, item: InFlight, device: Device) -> None:
        self._item = item
        self._device = device
        self._streams: set[Hashable] = set()  # whose work may read the tensors
        self.index = item.batch.index
        self.layers = item.batch.layers

    def __repr__(self) -> str:
        return f"<Batch {self.index} {self.layers}>"

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors by name, contiguous views of memory that is used again for later batches.

        Reading this property makes the calling thread's current stream wait for their copy, so read it in the
        thread, and on the stream, that computes. When the batch is given back, its memory is used again only
        after the work that was queued on that stream until then.
        """
        self._streams.add(self._device.stream())
        if self._item.copied is not None:
            self._device.wait(self._item.copied)
        return self._tensors

    def record(self) -> tuple[Event, ...]:
        """Record events behind all work that may read the tensors: on this thread's stream and where they were read."""
        streams = {self._device.stream(), *self._streams}
        return tuple(self._device.record(stream) for stream in streams)

    @cached_property
    def _tensors(self) -> Mapping[str, torch.Tensor]:
        images = {Place.HOST: self._item.host, Place.DEVICE: self._item.device}
        parts = []
        # A tensor made in inference mode could not be used where gradients are computed.
        with torch.inference_mode(mode=False):
            for place, views in self._item.batch.views.items():
                image = images[place]
                if image is None:
                    raise ClosedError(
                        f"layer batch {self.index} was given back; use its tensors before the next iteration"
                    )
                parts.append(image.tensors(views))
        # Most batches are used in one image, which keeps its tensors if it stays.
        return parts[0] if len(parts) == 1 else {k: v for part in parts for k, v in part.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _ComputeTimes:
    """The time that computation spends on a layer batch: times seen by the host, and events of the device.

    Computation counts from when it could begin (the batch was handed over, its copy and the computation before it
    were done) until the kernels that read the batch and the caller are done. On a GPU, the host may have gone on
    to later batches before the kernels begin.
    """

    batch: int
    nbytes: int
    requested_seconds: float
    handed_over_seconds: float
    given_back_seconds: float
    copied: tuple[Event, ...]
    computed: tuple[Event, ...]

    def add_to(self, clock: Clock, *, device: Device) -> bool:
        """Add the spans to ``clock``; False if the device does not know their times yet."""
        begun, ended = [self.handed_over_seconds], [self.given_back_seconds]
        for events, times in ((self.copied, begun), (self.computed, ended)):
            for event in events:
                passed = device.passed_at(event)
                if passed is None:
                    return False
                times.append(passed)
        # Count no moment twice: two batches may be in computation at once, on different streams.
        waiting = max(self.requested_seconds, clock.last_stop_seconds)
        working = clock.add(Activity.WAITING_IN, waiting, max(waiting, *begun), batch=self.batch)
        stop = max(working, *ended)
        clock.add(Activity.WORKING, working, stop, batch=self.batch, nbytes=self.nbytes)
        return True


class Handover:
    """The layer batch that a sweep holds, if any. The pipeline keeps it, so that a sweep that is dropped leaves none held.

    A sweep may be dropped in any thread and at any time. The garbage collector clears weak references to it before it
    calls its finalizer, so the reference tells at once what the finalizer tells later.

    Args:
        route: Gets the batches back.
        source: Where sweeps get their batches from.
        device: Where computation runs.
        clock: The timings of computation.

    Attributes:
        closed: The sweep has ended.
        sweep: The sweep itself, as long as somebody has it.
        dropped: Nobody has it any more.
    """

    def __init__(
        self, *, route: Route, source: Channel[InFlight], device: Device, clock: Clock
    ) -> None:
        self._route = route
        self._source = source
        self._device = device
        self._clock = clock
        self._held: tuple[InFlight, Batch] | None = None
        self._requested_seconds = self._handed_over_seconds = 0.0
        self.closed = False
        self.sweep: weakref.ref[Sweep] | None = None
        self.dropped = False

    @property
    def abandoned(self) -> bool:
        """Whether the sweep was dropped without being closed."""
        return self.dropped or self.sweep is None or self.sweep() is None

    async def receive(self) -> Batch:
        """The next batch that is wanted."""
        self._requested_seconds = time.perf_counter()
        while not (item := await self._source.get()).wanted:
            self._route.drop(item)
        batch = Batch(item, self._device)
        self._held = item, batch
        self._handed_over_seconds = time.perf_counter()
        return batch

    def give_back(self, after: Sequence[Event] | None = None) -> None:
        """Give back the batch that is held, if any.

        Args:
            after: Events behind the work that reads its tensors; by default those of ``Batch.record``.
        """
        if self._held is None:
            return
        (item, batch), self._held = self._held, None
        try:
            computed = tuple(batch.record() if after is None else after)
        except BaseException as error:
            # The device has failed. When its work with the slot ends is unknown, so that is not written again: no sweep
            # gets any more batches.
            self._source.close(error)
            raise
        times = _ComputeTimes(
            batch=item.batch.index,
            nbytes=item.batch.tensor_bytes,
            requested_seconds=self._requested_seconds,
            handed_over_seconds=self._handed_over_seconds,
            given_back_seconds=time.perf_counter(),
            copied=() if item.copied is None else (item.copied,),
            computed=computed,
        )
        self._route.done(item, computed)
        self._clock.add_later(partial(times.add_to, device=self._device))


class Sweep:
    """One pass over the layer batches of a route, in execution order: ``async for batch in sweep``.

    Made by ``Pipeline.sweep``. A batch is valid until the next iteration. Leaving early is allowed: the sweep
    ends when it is closed, left as a context manager, or dropped.

    Attributes:
        began_seconds: When it was made, by ``time.perf_counter``.
        prompt: Whether a prompt is processed in it: decides with which prediction it is compared.
        tokens: Tokens of the forward pass in it; None if there are several, or if it is unknown.
    """

    def __init__(
        self,
        *,
        order: Sequence[int],
        handover: Handover,
        on_end: Callable[["Sweep"], None],
        on_drop: Callable[[], None],
    ) -> None:
        self._order = tuple(order)
        self._handover = handover
        self._on_end = on_end
        self._on_drop = on_drop
        self._received = 0
        self.began_seconds = time.perf_counter()
        self.prompt = False
        self.tokens: int | None = None
        handover.sweep = weakref.ref(self)

    @property
    def complete(self) -> bool:
        """Whether all batches of the route have been received."""
        return self._received == len(self._order)

    async def receive(self) -> Batch | None:
        """The next batch, or None after the last. The previous one has to be given back first."""
        if self._handover.closed:
            raise ClosedError("this sweep has ended; ask the pipeline for a new one")
        if self.complete:
            return None
        try:
            batch = await self._handover.receive()
        except Exception:  # a stage failed: no sweep can be completed any more
            self.end()
            raise
        self._received += 1
        return batch

    def give_back(self, after: Sequence[Event] | None = None) -> None:
        """Give back the batch that was received last, if it is still held.

        Args:
            after: Events behind the work that reads its tensors; by default those of ``Batch.record``.
        """
        self._handover.give_back(after)

    def end(self) -> None:
        """Give back the batch that is held, and let the pipeline begin another sweep. May be called again."""
        if not self._handover.closed:
            self._handover.closed = True
            try:
                self._handover.give_back()
            finally:
                self._on_end(self)

    async def aclose(self) -> None:
        """End the sweep."""
        self.end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        self.give_back()
        batch = await self.receive()
        if batch is None:
            self.end()
            raise StopAsyncIteration
        return batch

    def __del__(self) -> None:
        # ``async for`` closes generators that are left early, but not iterators. This may run in any thread, in the middle
        # of anything: so it only tells.
        if not self._handover.closed:
            self._handover.dropped = True
            self._on_drop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()
