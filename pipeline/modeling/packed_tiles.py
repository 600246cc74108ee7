"""Memory that packed weights are unpacked into, and the time that it takes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerstream.pipeline.modeling.unpacked_once import UnpackedOnce
from layerstream.stages.memory import HostMemory
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import Activity, StageTimings

__all__ = ["Tiles"]


class Tiles:
    """Memory for tiles, for all packed weights of a model.

    Args:
        nbytes: Of the largest tile.
        count: How many computations run at once, each with a tile of its own; a further one waits.
        once_bytes: Memory for weights that are unpacked once for several passes.
    """

    def __init__(self, *, nbytes: int, count: int, once_bytes: int = 0) -> None:
        self.nbytes = nbytes
        self._clock = Clock("unpack")
        self._counting = threading.Lock()
        self.once = UnpackedOnce(once_bytes)
        self._free: list[torch.Tensor] = []
        self._left = count
        self._changed = threading.Condition()
        self._held = threading.local()

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
                memory = HostMemory(self.nbytes).tensor
                self._left -= 1
        self._held.one = True
        try:
            yield memory
        finally:
            self._held.one = False
            with self._changed:
                self._free.append(memory)
                self._changed.notify()

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
        """Free the memory that no computation has."""
        with self._changed:
            self._free.clear()
