"""The expert store: cells for the experts of all layers, filled on demand. Its methods may be called from any thread."""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial

import torch

from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import ClosedError
from layerstream.stages.experts.cells import Cell, CellRegion, queued_work
from layerstream.stages.experts.eviction import ExpertKey
from layerstream.stages.experts.expert_set import ExpertSet
from layerstream.stages.experts.lease import ExpertGroup, Lease, SharedDemand, WaitFor, groups_of
from layerstream.stages.experts.loader import ExpertLoader
from layerstream.stages.experts.regions import CellRegions
from layerstream.stages.experts.shared_demands import SharedDemands
from layerstream.stages.experts.usage import ExpertDemand, ExpertRoute, ExpertUsage, UsageCounter
from layerstream.stages.experts.whole_calls import WholeCalls
from layerstream.stages.telemetry.spans import ExpertCounts

__all__ = ["ExpertStore"]

_CLOSED = "the model was closed"

# A pass that is expected to need this share of a layer's experts will need whichever is read ahead.
_CERTAIN = 0.9


class ExpertStore:
    """Cells for experts, which layers with experts of equal size share.

    A demand of up to the layer's quota is computed with at once. Of a larger one (a long prompt), what the quota does not hold
    goes through a few cells group by group, so that it neither takes a whole layer's memory nor displaces what is kept.

    Args:
        sets: The experts of each layer, with the layer's quota of cells.
        passing_cells: How many more there are of each size, for what is only passing through; otherwise used like all others.
        allocate: Makes the memory of the cells, uint8 ``[nbytes]``; whoever frees it does so after ``close``.
        loader: Fills them; closed with the store.
        device: Where they are, if work that reads them may still be queued when they are given back.
    """

    def __init__(
        self,
        sets: Sequence[ExpertSet],
        *,
        passing_cells: int,
        allocate: Callable[[int], torch.Tensor],
        loader: ExpertLoader,
        device: Device | None = None,
    ) -> None:
        self.sets = tuple(sets)
        self._device = device
        # Of its thread: a read that has ended when it gets its callback calls that at once, in the thread that began it.
        self._lock = threading.RLock()
        self._waiting: list[Future[None]] = []  # for cells
        self._shared = SharedDemands()
        self._closed = False
        self._wanted = self._hits = 0
        self._wait_seconds = 0.0
        # Half of what is passing is computed with while the other half is read.
        self._group_size = max(passing_cells // 2, 1)
        self._counters = [UsageCounter(each.experts) for each in sets]
        self._recorded: ExpertRoute | None = None
        self._resources = ExitStack()
        self._loader = loader
        self._cells = CellRegions(self.sets, passing_cells, allocate)
        self._resources.callback(self._cells.close)
        self._resources.callback(loader.close)
        self._whole = WholeCalls()
        self._resources.callback(self._whole.close)

    def groups(
        self, set_index: int, experts: Sequence[int], *, in_order: bool = False
    ) -> list[ExpertGroup]:
        """A pass needs ``experts``, ascending: which of them are computed with together, first as many as the layer's quota.

        Half of the cells for what is passing make a group, so that the next one is read while one is computed with.

        Args:
            set_index: The layer.
            experts: What its tokens were routed to.
            in_order: Only ascending experts from group to group.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(_CLOSED)
            region, quota = self._cells.of_set[set_index], self._cells.quotas[set_index]
            ordered = list(experts)
            staying = region.demand([ExpertKey(set_index, expert) for expert in ordered])
            missing = [each for each in ordered if ExpertKey(set_index, each) not in region]
            if len(ordered) > quota:
                # The rest is passing, in cells of which every layer's quota counts a part.
                quota = self.sets[set_index].cells
                if not in_order:
                    ordered = [key.expert for key in staying]
        self._loader.demand(set_index, missing)
        kept, passing = ordered[:quota], sorted(ordered[quota:])
        return [
            *groups_of(set_index, kept, max(quota, 1), passing=False),
            *groups_of(set_index, passing, self._group_size, passing=True),
        ]

    def count(self, demand: ExpertDemand) -> None:
        """A pass needs these experts: for ``usage``, and for whoever records the route."""
        with self._lock:
            self._counters[demand.set_index].count(demand)
            if self._recorded is not None:
                self._recorded.add(demand)

    def record(self, route: ExpertRoute | None) -> None:
        """From now on add each demand to ``route``, or to none."""
        with self._lock:
            self._recorded = route

    def usage(self) -> dict[str, ExpertUsage]:
        """How tokens have chosen experts so far, by the paths of modules; without those that had too few passes to tell."""
        with self._lock:
            usages = [counter.usage() for counter in self._counters]
        each = zip(self.sets, usages, strict=True)
        return {experts.module: usage for experts, usage in each if usage is not None}

    def lease(self, group: ExpertGroup, demand: SharedDemand | None = None) -> Lease:
        """A lease for ``group``, or for what is next of ``demand``, that holds no cells before ``take``: whoever sees to its release first cannot lose any.

        Raises:
            ClosedError: The store was closed.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(_CLOSED)
            region = self._cells.of_set[group.set_index]
        return Lease(
            group, region, on_wait=self._count_wait, on_release=self._give_back, demand=demand
        )

    def take(self, lease: Lease, *, wait_for: WaitFor | None = Future.exception) -> bool:
        """Hold cells for the group of ``lease``, and begin to read what is not there; nothing if it holds them.

        Args:
            lease: Of at most as many experts as its region has cells.
            wait_for: How to wait until the cells can be had, which takes no longer than others compute with theirs: for who
                holds none. If this is None and they cannot be had at once, the result is False.

        Raises:
            ClosedError: The store was closed.
        """
        while (changed := self._whole.make(partial(self._take_now, lease))) is not None:
            if wait_for is None:
                return False
            wait_for(changed)
        return True

    def _take_now(self, lease: Lease) -> Future[None] | None:
        """Hold cells and begin to read, or when to try again."""
        with self._lock:
            if self._closed:
                raise ClosedError(_CLOSED)
            if lease.cells:
                return None
            self._shared.choose(lease, self._group_size)
            taken = lease.region.take(lease.group.keys, passing=lease.group.passing)
            if taken is None:
                changed: Future[None] = Future()
                self._waiting.append(changed)
                return changed
            cells, new = taken
            lease.hold(cells)
            self._shared.taken(lease)
            self._load_new(lease.group, lease.region, cells, new)
            self._wanted += len(cells)
            self._hits += len(cells) - len(new) - sum(cell.read_ahead for cell in cells)
            for cell in cells:
                cell.read_ahead = False
            return None

    def leave(self, demand: SharedDemand) -> None:
        """The pass needs no more of it. May be called again."""
        self._whole.make(partial(self._leave_now, demand))

    def _leave_now(self, demand: SharedDemand) -> None:
        with self._lock:
            self._shared.leave(demand)
            self._notify()

    def _notify(self) -> None:
        """Let those who wait for cells try again. The lock is held."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.set_result(None)

    def _load_new(
        self, group: ExpertGroup, region: CellRegion, cells: Sequence[Cell], new: Sequence[Cell]
    ) -> None:
        """Queue the reads of those of ``cells`` that are ``new``. The lock is held."""
        fresh = {id(cell) for cell in new}
        for cell, expert in zip(cells, group.experts, strict=True):
            if id(cell) in fresh:
                self._load(region, cell, self.sets[group.set_index], expert)
                if self._shared.grant(group.set_index, expert, region):
                    self._notify()

    def read_ahead(self, set_index: int, *, tokens: int) -> None:
        """Begin to read experts of a layer that a pass of ``tokens`` comes to next, if it is as good as certain to need all.

        Nobody holds them: they may make way for others before the pass has come.
        """
        if set_index >= len(self.sets):
            return
        experts = self.sets[set_index]
        if experts.distinct(tokens) < _CERTAIN * experts.experts:
            return
        self._whole.make(partial(self._read_ahead_now, set_index, experts))

    def _read_ahead_now(self, set_index: int, experts: ExpertSet) -> None:
        with self._lock:
            if self._closed:
                return
            region, size = self._cells.of_set[set_index], self._group_size
            passing = not (free := region.free_count)
            missing = region.missing(set_index, experts.experts, min(size, free or size))
            group = ExpertGroup(set_index=set_index, experts=missing, passing=passing)
            taken = region.take(group.keys, passing=passing) if missing else None
            if taken is not None:
                cells, new = taken
                self._load_new(group, region, cells, new)
                for cell in new:
                    cell.read_ahead = True
                for cell in cells:
                    region.release(cell)

    def _give_back(self, lease: Lease) -> None:
        """For ``Lease``."""
        used: Mapping[Hashable, Event] = {}
        try:
            if self._device is not None and lease.cells:
                used = queued_work(self._device)
        finally:  # also on a device that has failed
            self._whole.make(partial(self._give_back_now, lease, used))

    def _give_back_now(self, lease: Lease, used: Mapping[Hashable, Event]) -> None:
        with self._lock:
            for cell in lease.give_up():
                cell.readers.update(used)
                lease.region.release(cell)
            self._notify()

    def _count_wait(self, seconds: float) -> None:
        """For ``Lease``."""
        with self._lock:
            self._wait_seconds += seconds

    def counts(self) -> ExpertCounts:
        """What has been asked for so far."""
        with self._lock:
            return ExpertCounts(
                wanted=self._wanted,
                hits=self._hits,
                read_bytes=self._loader.nbytes,
                wait_seconds=self._wait_seconds,
            )

    def _load(self, region: CellRegion, cell: Cell, experts: ExpertSet, expert: int) -> None:
        """Begin to bring ``expert`` into ``cell``. The lock is held."""
        parts = self._loader.begin(cell, experts, expert)
        left = len(parts)
        failure: BaseException | None = None
        loaded = cell.loaded

        def done(read: Future[None]) -> None:
            nonlocal left, failure
            error = ClosedError(_CLOSED) if read.cancelled() else read.exception()
            with self._lock:
                left, failure = left - 1, failure or error
                if left:  # also after an error: the others still write into the cell
                    return
                if failure is None:
                    loaded.set_result(None)
                else:
                    region.forget(cell)
                    loaded.set_exception(failure)
                region.release(cell)
                self._notify()

        for each in parts:
            each.add_done_callback(done)

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """See ``ExpertLoader``."""
        return self._loader.abandon(error)

    def close(self) -> None:
        """Fail who waits, wait for reads that have begun and were not abandoned, free the memory."""
        with self._lock:
            self._closed = True
            self._notify()
        self._resources.close()
