"""The expert store: cells for the experts of all layers, filled on demand. Its methods may be called from any thread."""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import accumulate

import numpy as np
import torch

from layerstream.stages.errors import ClosedError
from layerstream.stages.experts.cells import Cell, CellRegion
from layerstream.stages.experts.expert_set import ExpertRead, ExpertSet
from layerstream.stages.experts.lease import ExpertGroup, Lease, WaitFor
from layerstream.stages.memory import HostMemory
from layerstream.stages.readers.direct import BLOCK_BYTES
from layerstream.stages.readers.protocol import Reader
from layerstream.stages.telemetry.spans import ExpertCounts
from layerstream.stages.threads import Threads

__all__ = ["ExpertStore"]

_CLOSED = "the model was closed"

# A pass that is expected to need this share of a layer's experts will need whichever is read ahead.
_CERTAIN = 0.9


class ExpertStore:
    """Cells for experts: a quota for each layer, and a few that all layers share for what is only passing through.

    A demand that fits the layer's quota is served from it, least recently used experts making way. Of a larger one (a long
    prompt), what the quota does not hold goes through the shared cells group by group, so that it neither takes a whole
    layer's memory nor displaces what is kept.

    Args:
        sets: The experts of each layer.
        shared_cells: How many cells all layers share.
        reader: The files.
        file_bytes: The size of each file.
        threads: How many requests are in flight.
        request_bytes: The size of one.
    """

    def __init__(
        self,
        sets: Sequence[ExpertSet],
        *,
        shared_cells: int,
        reader: Reader,
        file_bytes: Sequence[int],
        threads: int,
        request_bytes: int,
    ) -> None:
        self.sets = tuple(sets)
        self._reader = reader
        self._file_bytes = tuple(file_bytes)
        self._request_bytes = request_bytes
        self._lock = threading.Lock()
        self._waiting: list[Future[None]] = []  # for cells
        self._closed = False
        self._wanted = self._hits = self._read_bytes = 0
        self._wait_seconds = 0.0
        self._resources = ExitStack()
        largest = max((each.cell_bytes for each in sets), default=0)
        sizes = [each.cells * each.cell_bytes for each in sets]
        self._memory = HostMemory(sum(sizes) + shared_cells * largest)
        self._resources.callback(self._memory.close)
        starts = accumulate(sizes, initial=0)
        self._own = [
            CellRegion(self._memory.tensor.narrow(0, start, size), each.cell_bytes)
            for each, start, size in zip(sets, starts, sizes, strict=False)
        ]
        rest = self._memory.tensor.narrow(0, sum(sizes), shared_cells * largest)
        self._shared = CellRegion(rest, largest)
        self._staging = threading.local()
        self._threads = Threads("experts", threads)
        self._resources.callback(self._threads.close)

    @property
    def shared_group(self) -> int:
        """How many experts are computed with together in shared cells: one half, while the other one is read into."""
        return max(self._shared.count // 2, 1)

    # -- demand ----------------------------------------------------------------------------------

    def groups(self, set_index: int, experts: Sequence[int]) -> list[ExpertGroup]:
        """Which of ``experts``, ascending, are computed with together: first what the layer's own cells take.

        Half of the shared cells make a group, so that the next one is read while one is computed with.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(_CLOSED)
            own, shared = self._own[set_index], self._shared
            if len(experts) <= own.count or not shared.count:
                kept, rest = list(experts), []
            else:
                # What is there first, then from the beginning; of the rest what has been read ahead, before it makes way.
                kept = sorted(experts, key=lambda expert: expert not in own)[: own.count]
                rest = sorted(set(experts) - set(kept))
                rest.sort(key=lambda expert: (set_index, expert) not in shared)
        parts = ((kept, max(own.count, 1), False), (rest, self.shared_group, True))
        return [
            ExpertGroup(
                set_index=set_index, experts=tuple(sorted(each[at : at + size])), streamed=streamed
            )
            for each, size, streamed in parts
            for at in range(0, len(each), size)
        ]

    def take(
        self, group: ExpertGroup, *, wait_for: WaitFor | None = Future.exception
    ) -> Lease | None:
        """Hold cells for ``group``, and begin to read what is not there.

        Args:
            group: At most as many experts as its region has cells.
            wait_for: How to wait until the cells can be had, which takes no longer than others compute with theirs: for who
                holds none. If this is None, so is the result where they cannot be had at once.

        Raises:
            ClosedError: The store was closed.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise ClosedError(_CLOSED)
                region, keys = self._region(group)
                if (taken := region.take(keys)) is not None:
                    cells = self._taken(group, region, *taken)
                    break
                changed: Future[None] = Future()
                if wait_for is not None:
                    self._waiting.append(changed)
            if wait_for is None:
                return None
            wait_for(changed)
        return Lease(group, region, cells, on_wait=self._count_wait, on_release=self._give_back)

    def _taken(
        self, group: ExpertGroup, region: CellRegion, cells: Sequence[Cell], new: Sequence[Cell]
    ) -> Sequence[Cell]:
        """Count and load ``cells``, which a pass has got. The lock is held."""
        self._load_new(group, region, cells, new)
        self._wanted += len(cells)
        self._hits += len(cells) - len(new) - sum(cell.read_ahead for cell in cells)
        for cell in cells:
            cell.read_ahead = False
        return cells

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

    def read_ahead(self, set_index: int, *, tokens: int) -> None:
        """Begin to read experts of a layer that a pass of ``tokens`` comes to next, if it is as good as certain to need all.

        Nobody holds them: they may make way for others before the pass has come.
        """
        if set_index >= len(self.sets):
            return
        experts = self.sets[set_index]
        if experts.distinct(tokens) < _CERTAIN * experts.experts:
            return
        own, size = self._own[set_index], self.shared_group
        with self._lock:
            missing = [expert for expert in range(experts.experts) if expert not in own]
            streamed = not own.free_count
            at_most = size if streamed else min(own.free_count, size)
            group = ExpertGroup(
                set_index=set_index, experts=tuple(missing[:at_most]), streamed=streamed
            )
            region, keys = self._region(group)
            taken = None if self._closed or not keys else region.take(keys)
            if taken is not None:
                cells, new = taken
                self._load_new(group, region, cells, new)
                for cell in new:
                    cell.read_ahead = True
                for cell in cells:
                    region.release(cell)

    def _give_back(self, region: CellRegion, cells: Sequence[Cell]) -> None:
        """For ``Lease``."""
        with self._lock:
            for cell in cells:
                region.release(cell)
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
                read_bytes=self._read_bytes,
                wait_seconds=self._wait_seconds,
            )

    def _region(self, group: ExpertGroup) -> tuple[CellRegion, list[Hashable]]:
        if group.streamed:
            return self._shared, [(group.set_index, expert) for expert in group.experts]
        return self._own[group.set_index], list(group.experts)

    # -- loading ---------------------------------------------------------------------------------

    def _load(self, region: CellRegion, cell: Cell, experts: ExpertSet, expert: int) -> None:
        """Queue the reads of ``expert`` into ``cell``. The lock is held."""
        reads = list(
            experts.reads(expert, request_bytes=self._request_bytes, file_bytes=self._file_bytes)
        )
        left = len(reads)
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

        for each in reads:
            self._threads.submit(self._read, each, cell, experts, expert).add_done_callback(done)

    def _read(self, read: ExpertRead, cell: Cell, experts: ExpertSet, expert: int) -> None:
        staging = self._staging_buffer()
        padded = -(-read.extent.nbytes // BLOCK_BYTES) * BLOCK_BYTES
        try:
            self._reader.read(read.extent, memoryview(staging.data)[:padded])
        except Exception as error:
            error.add_note(f"layerstream: reading expert {expert} of {experts.module}")
            raise
        # numpy copies in this thread alone; torch would make a team of threads for each of ours.
        into = cell.tensor.numpy()
        for offset, cell_offset, nbytes in read.copies:
            np.copyto(into[cell_offset : cell_offset + nbytes], staging[offset : offset + nbytes])
        with self._lock:
            self._read_bytes += read.extent.nbytes

    def _staging_buffer(self) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """This thread's own buffer for one request: direct reads want aligned memory, tensors their own alignment."""
        known: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = getattr(
            self._staging, "buffer", None
        )
        if known is None:
            memory = HostMemory(self._request_bytes)
            with self._lock:
                self._resources.callback(memory.close)
            known = self._staging.buffer = memory.tensor.numpy()
        return known

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """Fail the reads in progress, and wait for none of them any more; whether there are any. See ``Threads``."""
        return self._threads.abandon(error)

    def close(self) -> None:
        """Fail who waits, wait for reads that have begun and were not abandoned, free the memory."""
        with self._lock:
            self._closed = True
            self._notify()
        self._threads.close()
        # Modules may outlive this, and refer to it.
        self._own, self._shared = [], CellRegion(torch.empty(0, dtype=torch.uint8), 0)
        self._resources.close()
