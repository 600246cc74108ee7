"""Memory that packed weights are unpacked into, the threads that unpack, and the time that it takes."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from layerstream.pipeline.modeling.unpacked_once import UnpackedOnce
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import Activity, StageTimings

__all__ = ["Tiles"]


class Tiles:
    """Memory for tiles, and threads that unpack into it, for all packed weights of a model.

    Args:
        nbytes: Of the largest tile.
        count: How many computations run at once, each with a tile of its own; a further one waits.
        threads: How many threads unpack a tile together, the computing one included.
        once_bytes: Memory for weights that are unpacked once for several passes.
    """

    def __init__(self, *, nbytes: int, count: int, threads: int, once_bytes: int = 0) -> None:
        self.nbytes = nbytes
        self._clock = Clock("unpack")
        self._counting = threading.Lock()
        self.once = UnpackedOnce(once_bytes)
        self._free: list[torch.Tensor] = []
        self._left = count
        self._changed = threading.Condition()
        self._held = threading.local()
        self._threads = threads
        self._executor = (
            ThreadPoolExecutor(threads - 1, "layerstream-unpack") if threads > 1 else None
        )

    @contextmanager
    def tile(self) -> Iterator[torch.Tensor]:
        """A tile, uint8 ``[nbytes]``; the memory is made when it is first needed, and kept.

        A thread that has one and asks for another gets it for the occasion: waiting, it might wait for itself.
        """
        if getattr(self._held, "one", False):
            yield torch.empty(self.nbytes, dtype=torch.uint8)
            return
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._left)
            if self._free:
                memory = self._free.pop()
            else:
                self._left -= 1
                memory = torch.empty(self.nbytes, dtype=torch.uint8)
        self._held.one = True
        try:
            yield memory
        finally:
            self._held.one = False
            with self._changed:
                self._free.append(memory)
                self._changed.notify()

    def share(self, count: int, work: Callable[[int, int], None], *, least: int) -> None:
        """Run ``work(begin, end)`` for equal parts of ``count`` items in all threads; returns when all are done.

        ``least``: How many items are worth another thread.
        """
        parts = min(self._threads, max(1, count // least))
        cuts = [count * part // parts for part in range(parts + 1)]
        others = []
        try:
            if self._executor is not None:
                others = [
                    self._executor.submit(work, begin, end)
                    for begin, end in itertools.pairwise(cuts[1:])
                ]
            work(cuts[0], cuts[1])
        finally:
            wait(others)  # they write into the tile
        for each in others:
            each.result()

    @contextmanager
    def unpacking(self, nbytes: int) -> Iterator[None]:
        """Count the time that unpacking ``nbytes``, as they are packed, takes in here."""
        began = time.perf_counter()
        yield
        with self._counting:
            self._clock.add(Activity.WORKING, began, time.perf_counter(), batch=-1, nbytes=nbytes)

    def times(self) -> StageTimings:
        """The time that unpacking took: one item for each tile; those of several forward passes may overlap."""
        with self._counting:
            return self._clock.sums()

    def close(self) -> None:
        """End the threads, and free the memory that no computation has."""
        if self._executor is not None:
            self._executor.shutdown()
        with self._changed:
            self._free.clear()
