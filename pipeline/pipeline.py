"""Wires the three stages for one plan; owns their tasks, threads, memory and files.

```
disk ──> [read] ──queue──> [transfer] ──queue──> [compute] ──> the caller
           │ host slots       │ device slots        │
           └───── free <──────┴───── free <─────────┘
```
"""

import asyncio
import logging
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from layerstream.pipeline.adoption import check_alike, without_residents
from layerstream.pipeline.plan import Plan
from layerstream.pipeline.reading import open_reader
from layerstream.pipeline.record import SweepRecord
from layerstream.stages.arena import RingArena
from layerstream.stages.channel import Channel
from layerstream.stages.compute import Batch, Sweep
from layerstream.stages.devices import Device, Event, open_device
from layerstream.stages.errors import BusyError, ClosedError, PlanError, noting
from layerstream.stages.mmap_reader import MmapReader
from layerstream.stages.read import read_stage
from layerstream.stages.readers import Reader
from layerstream.stages.residents import Residents
from layerstream.stages.route import InFlight, Route
from layerstream.stages.threads import Once, Threads, finish_in_thread
from layerstream.stages.timings import Clock, Timings
from layerstream.stages.transfer import transfer_stage

__all__ = ["Pipeline"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One batch ready behind each stage absorbs jitter; how many are under way is for the arenas to bound.
_QUEUE_SIZE = 1


class Pipeline:
    """Streams the layer batches of a plan past a computation, sweep after sweep.

    Reading, copying and computing go on at once. Between two sweeps the first batches of the next one are
    already on their way; when nobody asks for it, the queues fill and everything parks.

    Args:
        plan: what to stream, and how.
        device: where to, instead of what the plan names (for tests).
        reader: how, instead of what the plan names (for tests). The pipeline closes it.

    An error in any stage ends the pipeline: the sweep under way raises it, and so does every later one.
    """

    def __init__(
        self, plan: Plan, *, device: Device | None = None, reader: Reader | None = None
    ) -> None:
        self.plan = plan
        self._device_given = device
        self._reader_given = reader
        self._clocks = tuple(Clock(name) for name in ("read", "transfer", "compute"))
        self._arenas: tuple[RingArena, ...] = ()
        self._record = SweepRecord(on_gpu=plan.device_memory is not None)
        self._current: weakref.ref[Sweep] | None = None
        self._stages: asyncio.Task[None] | None = None
        self._resources = ExitStack()
        self._closed = False
        # Whoever asks for a sweep meanwhile is refused, as by a sweep.
        self._adopting = asyncio.Lock()
        self._closing = Once()
        self._opened_at = time.perf_counter()

    # -- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Open the files, take the memory, start the stages.

        Raises:
            CheckpointError: the files are not those of the plan.
            DeviceError: the device is not there, or has not the memory.
        """
        if self._stages is not None or self._closed:
            raise ClosedError("a pipeline is opened once; make a new one from the same plan")
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        try:
            # Page-locking memory takes seconds: off the loop, and to its end even if we are cancelled.
            await finish_in_thread(self._acquire)
        except BaseException:
            await finish_in_thread(self._resources.close)
            raise
        plan = self.plan
        host_arena, device_arena = self._arenas
        self._route = Route(plan.batches, self._residents)
        arrived: Channel[InFlight] = Channel(_QUEUE_SIZE)
        self._ready: Channel[InFlight] = Channel(_QUEUE_SIZE)
        read_clock, transfer_clock, self._compute_clock = self._clocks
        reader = self._reader
        reading = read_stage(
            route=self._route,
            reader=self._reader,
            mapped=reader
            if isinstance(reader, MmapReader) and self._device.reads_host_images
            else None,
            arena=host_arena,
            residents=self._residents,
            threads=self._read_threads,
            request_bytes=plan.read_request_bytes,
            out=arrived,
            clock=read_clock,
        )
        transferring = transfer_stage(
            route=self._route,
            source=arrived,
            device=self._device,
            arena=device_arena,
            residents=self._residents,
            threads=self._transfer_threads,
            out=self._ready,
            clock=transfer_clock,
        )
        self._stages = asyncio.create_task(
            self._run_stages(reading, transferring), name="layerstream-stages"
        )
        self._opened_at = time.perf_counter()
        logger.info("streaming %s\n%s", plan.checkpoint, plan.describe())

    def _acquire(self) -> None:
        """Take files, threads and memory, each with the way to give it back."""
        plan, resources = self.plan, self._resources
        self._device: Device = self._device_given or open_device(plan.device)
        # Behind all else, so that other processes have the memory.
        resources.callback(self._device.trim)
        self._reader = self._reader_given or open_reader(plan)
        resources.callback(self._reader.close)
        self._residents = Residents(plan.batches, self._device)
        resources.callback(self._residents.close)
        ring = self._device.host_memory(plan.host_arena_bytes)
        resources.callback(self._device.release_host_memory, ring)
        device_ring = self._device.device_memory(plan.device_arena_bytes)
        self._arenas = (RingArena(ring.tensor), RingArena(device_ring))
        for arena in self._arenas:
            resources.callback(arena.close)
        # Computation that was given to the device may still read what is given back from here on.
        resources.callback(self._device.drain)
        self._read_threads = Threads("read", plan.reads_in_flight)
        resources.callback(self._read_threads.close)
        self._transfer_threads = Threads("transfer", 2)
        resources.callback(self._transfer_threads.close)
        self._compute_threads = Threads("compute", 1)
        resources.callback(self._compute_threads.close)

    async def _run_stages(self, *stages: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for stage in stages:
                    tasks.create_task(self._run_stage(stage))
        except BaseExceptionGroup:
            pass  # the stage that failed has told the caller
        finally:
            self._ready.close(ClosedError("the pipeline was closed"))

    async def _run_stage(self, stage: Coroutine[Any, Any, None]) -> None:
        try:
            await stage
        except BaseExceptionGroup as group:
            if not self._ready.closed:  # or else this is the echo of an error that was told
                error = _first(group)
                _forget_locals(error)
                # Now, not when the threads of the other stage are through with what they have begun.
                self._ready.close(error)
                self._reader.interrupt()
            raise

    async def aclose(self) -> None:
        """Stop the stages and give everything back, waiting for what cannot be stopped.

        May be called again, and by several.
        """
        self._closed = True
        await self._closing.run(self._close)

    async def _close(self) -> None:
        if self._stages is not None:
            self._reader.interrupt()
            self._stages.cancel()
            await asyncio.wait([self._stages])
            sweep = self._current() if self._current is not None else None
            if sweep is not None:
                sweep.end()
            async with self._adopting:  # it hears of it, and leaves
                await self._route.empty()
        await finish_in_thread(self._resources.close)

    # -- use -------------------------------------------------------------------------------------

    def sweep(self, route: Sequence[int] | None = None) -> Sweep:
        """One pass over the layer batches: ``async for batch in pipeline.sweep()``.

        Args:
            route: indices of the batches to visit, in order; by default all of them.

        Raises:
            BusyError: another sweep is under way.
            ClosedError: the pipeline is not open.
        """
        self._check_idle()
        order = tuple(route) if route is not None else tuple(range(len(self.plan.batches)))
        if not order or not all(0 <= index < len(self.plan.batches) for index in order):
            raise PlanError(
                f"route {order} does not lie within the plan's {len(self.plan.batches)} batches"
            )
        self._route.redirect(order)
        self._record.loading = not self._residents.complete
        sweep = Sweep(
            order=order,
            route=self._route,
            source=self._ready,
            device=self._device,
            clock=self._compute_clock,
            on_end=self._ended,
            on_drop=self._dropped,
        )
        self._current = weakref.ref(sweep)
        return sweep

    def _check_idle(self) -> None:
        if self._stages is None or self._closed:
            raise ClosedError("the pipeline is not open; use it inside `async with`")
        if self._adopting.locked() or (self._current is not None and self._current() is not None):
            raise BusyError(
                "a sweep is under way on this pipeline; finish or close it first, or share sweeps "
                "through StreamedModel"
            )

    async def run(
        self,
        compute: Callable[[Batch, T], T],
        state: T,
        *,
        route: Sequence[int] | None = None,
    ) -> T:
        """Fold ``compute(batch, state) -> state`` over one sweep, in the compute thread.

        If the waiting task is cancelled, the computation of the batch at hand is finished first.
        """
        after: list[Event] = []

        def step(batch: Batch, state: T) -> T:
            try:
                with noting("compute", self.plan.batches[batch.index]):
                    return compute(batch, state)
            finally:
                # In this thread, on its stream; and also when the result is an error or nobody wants it any
                # more, since what was given to the device until then still reads the tensors.
                after[:] = batch.record()

        async with self.sweep(route) as sweep:
            while (batch := await sweep.receive()) is not None:
                try:
                    state = await self._compute_threads.run(step, batch, state)
                finally:
                    sweep.give_back(after)
        return state

    async def adopt(self, plan: Plan) -> None:
        """Go on by ``plan``, which has other residents than the one so far, and is equal in all else.

        For use between two sweeps. What becomes resident is kept when it next passes. Where something ceases
        to be, its memory is given back before this returns, and what was read ahead is read once more.

        Raises:
            BusyError: a sweep is under way.
            ClosedError: the pipeline is not open.
            DeviceError: there is no memory for the new residents: none has come, and what was to go has gone.
            PlanError: the plans differ in more.
        """
        self._check_idle()
        check_alike(self.plan, plan)
        async with self._adopting:
            await self._swap_residents(plan)

    async def _swap_residents(self, plan: Plan) -> None:
        # What has memory is asked, not the old plan: a change that was broken off may have come between.
        gone = self._residents.superseded(plan.batches)
        if gone:
            # Whatever becomes of the rest, this is how it is from here on.
            self.plan = without_residents(self.plan, gone)
            self._route.replace(self.plan.batches)
            self._route.recall()
            # Through the stages, since their threads may be copying from what is to be given back.
            while not (await self._ready.peek()).wanted:
                self._route.drop(await self._ready.get())
            await finish_in_thread(self._device.drain)
            await finish_in_thread(lambda: self._residents.remove(gone))
        added = False

        def add() -> None:
            nonlocal added
            self._residents.add(plan.batches)
            added = True

        try:
            await finish_in_thread(add)
        finally:
            if added:  # also if the waiting task was cancelled meanwhile
                self._route.replace(plan.batches)
                self.plan = plan

    def timings(self) -> Timings:
        """What the stages have done since the pipeline was opened: of a GPU's work, what it is through with."""
        sizes = (self.plan.host_arena_bytes, self.plan.device_arena_bytes)
        arenas = zip(("host slots", "device slots"), sizes, self._arenas, strict=False)
        return self._record.timings(
            self._clocks,
            opened_seconds=self._opened_at,
            labels=tuple(batch.label for batch in self.plan.batches),
            occupancy=tuple(
                arena.occupancy(name=name, capacity_bytes=size)
                for name, size, arena in arenas
                if size
            ),
        )

    def _ended(self, sweep: Sweep) -> None:
        current = self._current() if self._current is not None else None
        if current is not None and current is not sweep:
            return  # dropped in another thread, and the next sweep, now under way, was faster than the news
        self._current = None
        if sweep.complete:
            self._record.count(sweep, self.plan.prediction)
        else:
            # The next sweep most likely begins at the beginning: what is under way is dropped for it.
            self._route.restart()

    def _dropped(self, sweep: Sweep) -> None:
        """A sweep was left without being closed. Its finalizer runs in whichever thread dropped it."""
        if self._loop.is_closed():
            return
        if threading.get_ident() == self._thread:
            sweep.end()
        else:
            self._loop.call_soon_threadsafe(sweep.end)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that made the others: a group of one has one, and the rest are its echoes."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _forget_locals(error: BaseException | None) -> None:
    """Drop the local variables that ``error`` came past: views of slots, which would keep all of them mapped."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
