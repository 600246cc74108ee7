"""Ring arenas: one block of memory per side, from which layer batches of any size take their slots in turn."""

import asyncio
from collections import deque
from collections.abc import Sequence

import torch

from layerstream.stages.devices.protocol import Event
from layerstream.stages.errors import PlanError
from layerstream.stages.telemetry.clock import Gauge
from layerstream.stages.telemetry.spans import SPANS_KEPT, Activity, Occupancy, Span

__all__ = ["RingArena", "Slot", "ring_bytes"]


def ring_bytes(sizes: Sequence[int], *, slots: int) -> int:
    """The size of a ring that holds any ``slots`` consecutive batches of the cyclic sequence ``sizes``.

    A large batch counts once in each window of ``slots`` batches, instead of setting the size of every slot.
    Slots are contiguous, so with batches of different sizes a slot may have to wait for the end of the ring.
    """
    count = len(sizes)
    windows = range(count) if count > slots else range(1)
    return max(
        (sum(sizes[(start + i) % count] for i in range(min(slots, count))) for start in windows),
        default=0,
    )


class Slot:
    """A piece of an arena that holds one layer batch.

    Attributes:
        offset: Bytes from the start of the arena.
        tensor: The bytes, uint8 ``[nbytes]``.
        after: Events that must have passed before the slot is written.
        batch: Index of the layer batch that it holds; -1 if unknown.
        taken_seconds: When it was taken, by ``time.perf_counter``.
    """

    __slots__ = ("_freed", "after", "batch", "nbytes", "offset", "taken_seconds", "tensor")

    def __init__(self, offset: int, tensor: torch.Tensor, after: tuple[Event, ...]) -> None:
        self.offset = offset
        self.nbytes = tensor.numel()
        self.tensor = tensor
        self.after = after
        self.batch = -1
        self.taken_seconds = 0.0
        self._freed = False


class RingArena:
    """A ring of memory whose slots are taken in order, by one task of one event loop.

    A slot is contiguous, so a batch that does not fit before the end of the ring is put at its beginning. Any
    batch that is not larger than the ring gets its slot at the latest when the ring is empty.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._size_bytes = memory.numel()  # also when closed
        self.gauge = Gauge()  # of the bytes in slots
        self.spans: deque[Span] = deque(maxlen=SPANS_KEPT)  # of slots that were given back
        self._live: deque[Slot] = deque()
        self._end = 0  # where the newest slot ends
        self._events: list[tuple[int, int, Event]] = []  # (start, stop, event) of slots given back
        self._freed = asyncio.Event()

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the whole ring."""
        return self._memory.numel()

    async def take(self, nbytes: int, *, batch: int = -1) -> Slot:
        """Take the next ``nbytes`` as a slot, as soon as that much is free. A cancelled wait takes nothing.

        Args:
            nbytes: Size of the slot.
            batch: Index of the layer batch that it is for, shown in timings.

        Raises:
            PlanError: The ring is smaller than the slot.
        """
        if nbytes > self.capacity_bytes:
            raise PlanError(
                f"a layer batch of {nbytes} bytes does not fit an arena of {self.capacity_bytes} bytes; "
                "make the plan anew for these files"
            )
        while (offset := self._find_offset(nbytes)) is None:
            self._freed.clear()
            await self._freed.wait()
        stop = offset + nbytes
        slot = Slot(offset, self._memory[offset:stop], self._take_events(offset, stop))
        self._live.append(slot)
        slot.batch, slot.taken_seconds = batch, self.gauge.change(nbytes)
        self._end = stop
        return slot

    def give_back(self, slot: Slot, after: Sequence[Event] = ()) -> None:
        """Give ``slot`` back; it is written again only once all of ``after`` have passed.

        Giving back twice would hand the same bytes to two batches, so it is refused.
        """
        if slot._freed:  # noqa: SLF001
            raise AssertionError(f"slot at {slot.offset} was given back twice")
        slot._freed = True  # noqa: SLF001
        now = self.gauge.change(-slot.nbytes)
        self.spans.append(Span(Activity.HOLDING, slot.batch, slot.taken_seconds, now, slot.nbytes))
        slot.tensor = torch.empty(0, dtype=torch.uint8)
        # No later slot overlaps an empty one, so its events would be kept forever.
        if slot.nbytes:
            self._events += [(slot.offset, slot.offset + slot.nbytes, event) for event in after]
        while self._live and self._live[0]._freed:  # noqa: SLF001
            self._live.popleft()
        self._freed.set()

    def occupancy(self, name: str) -> Occupancy:
        """How full the ring has been, labelled ``name``. Works after ``close``, too."""
        return Occupancy(
            name=name,
            capacity_bytes=self._size_bytes,
            mean_bytes=self.gauge.mean(),
            peak_bytes=self.gauge.peak,
            spans=tuple(self.spans),
        )

    def close(self) -> None:
        """Drop the memory; it is freed with the last view of it."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _find_offset(self, nbytes: int) -> int | None:
        if not self._live:
            return 0
        first = self._live[0].offset
        if self._end <= first:  # wrapped: the gap between the newest and the oldest
            return self._end if first - self._end >= nbytes else None
        if self.capacity_bytes - self._end >= nbytes:
            return self._end
        return 0 if first >= nbytes else None

    def _take_events(self, start: int, stop: int) -> tuple[Event, ...]:
        """Remove and return the events of the given range, of every slot that lay there."""
        due, kept = [], []
        for begin, end, event in self._events:
            if end <= start or stop <= begin:
                kept.append((begin, end, event))
                continue
            due.append(event)
            kept += [(a, b, event) for a, b in ((begin, start), (stop, end)) if a < b]
        self._events = kept
        return tuple(due)
