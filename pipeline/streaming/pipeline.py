"""Connects the three stages for one plan, and owns their tasks.

```
disk ──> [read] ──queue──> [transfer] ──queue──> [compute] ──> the caller
           │ host slots       │ device slots        │
           └───── free <──────┴───── free <─────────┘
```
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.streaming.resources import Resources, open_reader, throttle_of
from layerstream.pipeline.streaming.supervision import start_stages
from layerstream.pipeline.streaming.sweep_log import SweepLog
from layerstream.pipeline.streaming.switching import check_compatible, swap_residents
from layerstream.stages.compute import Batch, Handover, Sweep
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import BusyError, ClosedError, PlanError, annotated
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.protocol import Reader
from layerstream.stages.readers.throttled import Throttle
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import StageTimings
from layerstream.stages.telemetry.timings import Timings
from layerstream.stages.threads import Lifetime, finish_in_thread

__all__ = ["Pipeline"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Pipeline:
    """Streams the layer batches of a plan past a computation, sweep after sweep.

    Reading, copying and computing overlap. At the end of a sweep the first batches of the next one are already being read; if
    no sweep is requested, the queues fill and the stages wait. An error in any stage ends it: all sweeps raise it from then on.

    Args:
        plan: What to stream, and how.
        device: Used instead of the one that the plan names (for tests).
        reader: Used instead of the one that the plan names (for tests). The pipeline closes it.
        guard: Watches over the reads, and reports those that hang; by default one of the pipeline's own.
        unpacking: Returns the time that unpacking weights takes while computing.
        throttle: What other reads of the same files wait for, too, if the plan's reader is throttled.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: Device | None = None,
        reader: Reader | None = None,
        guard: ReadGuard | None = None,
        unpacking: Callable[[], StageTimings | None] = lambda: None,
        throttle: Throttle | None = None,
    ) -> None:
        self.plan, self._unpacking = plan, unpacking
        self._throttle = throttle
        self._clocks = tuple(Clock(name) for name in ("read", "transfer", "compute"))
        self._sweep_log = SweepLog(on_gpu=not plan.on_cpu)
        self._current: Handover | None = None  # of the sweep under way
        self._stages: asyncio.Task[None] | None = None
        self._resources = Resources()
        self._device, self._reader = device, reader
        self._guard = ReadGuard() if guard is None else guard.part()
        self._adopting = asyncio.Lock()  # while it is held, sweeps are refused
        self._lifetime = Lifetime(
            "the pipeline",
            again="make a new one from the same plan",
            opens=self._open,
            closes=self._close,
        )
        self._opened_at = time.perf_counter()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Open the files, take the memory, start the stages.

        Raises:
            CheckpointError: The files are not those of the plan.
            DeviceError: The device is not there, or does not have the memory.
            ClosedError: It was opened before, or is closed meanwhile.
        """
        await self._lifetime.open()

    async def _open(self) -> "Pipeline":
        self._loop = asyncio.get_running_loop()
        reader = self._reader
        if reader is None:
            reader = await finish_in_thread(
                lambda: open_reader(
                    self.plan, self._guard, self._throttle or throttle_of(self.plan)
                ),
                guard=self._guard,
            )
        acquire = functools.partial(
            self._resources.acquire,
            self.plan,
            device=self._device,
            reader=reader,
            guard=self._guard,
        )
        await finish_in_thread(acquire)  # page-locking memory takes seconds
        *clocks, self._compute_clock = self._clocks
        self._route, self._ready, self._stages = start_stages(self.plan, self._resources, *clocks)
        self._opened_at = time.perf_counter()
        if logger.isEnabledFor(logging.INFO):
            logger.info("streaming %s\n%s", self.plan.checkpoint, self.plan.describe())
        return self

    async def aclose(self) -> None:
        """Stop the stages and free everything, after the calls that cannot be stopped have returned.

        A read that hangs (see ``ReadGuard``) is not waited for: it is logged, and its thread, its buffer and its file are
        left to it until it returns. May be called again, by several tasks, and while the pipeline is being opened, which that ends.
        """
        await self._lifetime.close()

    async def _close(self) -> None:
        self._guard.stop()
        try:
            if self._stages is not None:
                self._resources.reader.interrupt()
                self._stages.cancel()
                await asyncio.wait([self._stages])
                if self._current is not None:
                    self._current.closed = True  # its batch is dropped with all others
                async with self._adopting:  # an ``adopt`` under way fails by now, and releases it
                    await self._route.empty()
        finally:
            try:
                await finish_in_thread(self._resources.close, without_thread=True)
            finally:  # a device that has failed may say so
                self._guard.close()

    def sweep(self, route: Sequence[int] | None = None) -> Sweep:
        """One pass over the layer batches: ``async for batch in pipeline.sweep()``.

        Args:
            route: Indices of the batches to visit, in order; by default all of them.

        Raises:
            BusyError: Another sweep is under way.
            ClosedError: The pipeline is not open.
            PlanError: The plan has no such batches.
        """
        self._check_idle()
        order = tuple(route) if route is not None else tuple(range(len(self.plan.batches)))
        if not order or not all(0 <= index < len(self.plan.batches) for index in order):
            raise PlanError(
                f"route {order} does not lie within the plan's {len(self.plan.batches)} batches"
            )
        self._route.redirect(order)
        self._sweep_log.loading = not self._resources.residents.complete
        self._current = handover = Handover(
            route=self._route,
            source=self._ready,
            device=self._resources.device,
            clock=self._compute_clock,
        )
        return Sweep(order=order, handover=handover, on_end=self._ended, on_drop=self._dropped)

    def _check_idle(self) -> None:
        if self._stages is None or self._lifetime.closed:
            raise ClosedError("the pipeline is not open; use it inside `async with`")
        self._end_dropped()
        if self._adopting.locked() or self._current is not None:
            raise BusyError(
                "a sweep is under way on this pipeline; finish or close it first, or share sweeps "
                "through StreamedModel"
            )

    async def run(
        self, compute: Callable[[Batch, T], T], state: T, *, route: Sequence[int] | None = None
    ) -> T:
        """Fold ``compute(batch, state) -> state`` over one sweep, in the compute thread; cancelled, it finishes a batch first."""
        after: list[Event] = []

        def step(batch: Batch, state: T) -> T:
            try:
                with annotated("compute", self.plan.batches[batch.index]):
                    return compute(batch, state)
            finally:
                # In this thread, on its stream; also after an error, since work that was queued on the device before
                # the error still reads the tensors.
                after[:] = batch.record()

        async with self.sweep(route) as sweep:
            while (batch := await sweep.receive()) is not None:
                try:
                    state = await self._resources.compute_threads.run(step, batch, state)
                finally:
                    sweep.give_back(after or None)
                    after.clear()
        return state

    async def adopt(self, plan: Plan) -> None:
        """Replace the plan by one that differs from it only in its residents.

        For use between two sweeps. The next sweep loads the new residents. The memory of former residents is freed
        before this returns; if there were any, what was read ahead is read again.

        Raises:
            BusyError: A sweep is under way.
            ClosedError: The pipeline is not open.
            DeviceError: There is no memory for the new residents: none was added, the former ones are gone.
            PlanError: The plans differ in more than residents.
        """
        self._check_idle()
        check_compatible(self.plan, plan)
        async with self._adopting:
            await swap_residents(
                self.plan,
                plan,
                resources=self._resources,
                route=self._route,
                ready=self._ready,
                put_into_effect=self._put_into_effect,
            )

    def _put_into_effect(self, plan: Plan) -> None:
        self._route.replace(plan.batches)
        self.plan = plan

    @property
    def experts(self) -> ExpertStore | None:
        """The experts that are read on demand; None if the plan has none."""
        return self._resources.experts

    def timings(self) -> Timings:
        """What the stages have done since the pipeline was opened; a GPU's work counts once it is finished."""
        return self._sweep_log.timings(
            self._clocks,
            opened_seconds=self._opened_at,
            labels=tuple(batch.label for batch in self.plan.batches),
            occupancy=self._resources.occupancy(),
            experts=self.experts.counts() if self.experts is not None else None,
            unpacking=self._unpacking(),
        )

    def _ended(self, sweep: Sweep) -> None:
        self._current = None
        if sweep.complete:
            self._sweep_log.count(sweep, self.plan.prediction, self.experts)
        else:
            # The next sweep most likely begins at the first batch, so drop the rest of this one.
            self._route.restart()

    def _dropped(self) -> None:
        """A sweep was dropped: its finalizer runs in any thread, so the sweep is ended on the event loop."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end_dropped)

    def _end_dropped(self) -> None:
        """End the sweep under way if it was dropped without being closed."""
        handover = self._current
        if handover is not None and handover.abandoned and not handover.closed:
            handover.closed, self._current = True, None
            handover.give_back()
            self._route.restart()
