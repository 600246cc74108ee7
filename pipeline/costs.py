"""What a sweep takes: the three stages, played through in time for one plan. Pure.

The design's formula, ``max(D / disk, H / h2d, C) + batches x overhead``, holds for stages that never wait
for one another. Slots are few and batches differ, so that they do; so each batch is followed through the
stages here, as the pipeline moves it, with times instead of bytes.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerstream.pipeline.prediction import SweepPrediction

__all__ = ["BatchCost", "play"]

# How many batches may be under way beside the one that is computed with, however much room there is: two in
# the read stage, one on its way into the queue behind it, one in each of the two queues, one being copied.
_AHEAD = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCost:
    """What one layer batch takes of each stage in one sweep."""

    read_seconds: float = 0.0
    copy_seconds: float = 0.0
    compute_seconds: float = 0.0
    host_bytes: int = 0  # of its slot in the host ring; 0: it takes none
    device_bytes: int = 0  # of its slot in the device ring
    copied_away: bool = False  # the host slot comes free with the copy, not behind the computation


def play(
    sweeps: Iterable[Sequence[BatchCost]],
    *,
    host_ring_bytes: int,
    device_ring_bytes: int,
    overhead_seconds: float,
    between_seconds: float,
) -> list[SweepPrediction]:
    """Play sweeps back to back, each given as what its batches take in the order of its route.

    Args:
        sweeps: prefetch wraps around from each to the next.
        host_ring_bytes: the ring that host slots come from.
        device_ring_bytes: the ring that device slots come from.
        overhead_seconds: of computation's time that each batch takes for being handed over.
        between_seconds: from the end of a sweep until computation wants the next one's first batch.
    """
    host, device = _Ring(host_ring_bytes), _Ring(device_ring_bytes)
    read_done = copied = computed = 0.0
    # When computation began with each of the last few.
    begun: deque[float] = deque([0.0] * _AHEAD, maxlen=_AHEAD)
    costs = []
    for batches in sweeps:
        start = computed
        ready = computed + between_seconds
        for batch in batches:
            room = max(host.take(batch.host_bytes), begun[0])
            read_done = max(read_done, room) + batch.read_seconds
            landed = copied = (
                max(copied, read_done, device.take(batch.device_bytes)) + batch.copy_seconds
            )
            began = max(ready, landed)
            ready = computed = began + overhead_seconds + batch.compute_seconds
            begun.append(began)
            host.freed(landed if batch.copied_away else computed)
            device.freed(computed)
        costs.append(
            SweepPrediction(
                seconds=computed - start,
                read_seconds=sum(batch.read_seconds for batch in batches),
                transfer_seconds=sum(batch.copy_seconds for batch in batches),
                compute_seconds=sum(batch.compute_seconds for batch in batches),
                overhead_seconds=len(batches) * overhead_seconds + between_seconds,
            )
        )
    return costs


class _Ring:
    """``RingArena``, with the times at which its slots come free in place of the wait for them."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = nbytes
        self._live: deque[tuple[int, float]] = deque()  # (offset, when it comes free), oldest first
        self._end = 0
        self._now = 0.0
        self._taken: int | None = None  # the offset of the slot whose end is not known yet

    def take(self, nbytes: int) -> float:
        """When the next slot is there."""
        self._taken = None
        if not nbytes:
            return 0.0
        self._settle()
        while (offset := self._find(nbytes)) is None:
            self._now = max(self._now, self._live[0][1])
            self._settle()
        self._taken, self._end = offset, offset + nbytes
        return self._now

    def freed(self, at: float) -> None:
        """The slot that was taken last comes free at that time."""
        if self._taken is not None:
            self._live.append((self._taken, at))

    def _settle(self) -> None:
        # A slot that came free before an older one waits for that one.
        while self._live and self._live[0][1] <= self._now:
            self._live.popleft()

    def _find(self, nbytes: int) -> int | None:
        if not self._live:
            return 0
        first = self._live[0][0]
        if self._end <= first:
            return self._end if first - self._end >= nbytes else None
        if self._bytes - self._end >= nbytes:
            return self._end
        return 0 if first >= nbytes else None
