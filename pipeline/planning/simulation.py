"""The time of a sweep: a simulation of the three stages for one plan. Pure.

The design's formula, ``max(D / disk, H / h2d, C) + batches x overhead``, holds for stages that never wait
for one another. With few slots and batches of different sizes they do wait; so each batch is followed through the
stages here, as in the pipeline, with times instead of bytes.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerstream.pipeline.planning.prediction import SweepPrediction

__all__ = ["BatchCost", "simulate"]

# How many batches may be under way besides the one that is computed with, however large the rings are: two in
# the read stage, one on its way into the queue behind it, one in each of the two queues, one being copied.
_AHEAD = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCost:
    """The time that one layer batch takes in each stage of one sweep."""

    read_seconds: float = 0.0
    copy_seconds: float = 0.0
    compute_seconds: float = 0.0
    host_bytes: int = 0
    """Of its slot in the host ring; 0: it takes none."""
    device_bytes: int = 0
    """Of its slot in the device ring."""
    copied_away: bool = False
    """The host slot is free after the copy, not after the computation."""


def simulate(
    sweeps: Iterable[Sequence[BatchCost]],
    *,
    host_ring_bytes: int,
    device_ring_bytes: int,
    overhead_seconds: float,
    between_seconds: float,
) -> list[SweepPrediction]:
    """Simulate consecutive sweeps, each given as the costs of its batches in the order of its route.

    Args:
        sweeps: Prefetch runs on from each to the next.
        host_ring_bytes: Size of the ring of host slots.
        device_ring_bytes: Size of the ring of device slots.
        overhead_seconds: That computation spends on the hand-off of each batch.
        between_seconds: From the end of a sweep until computation wants the first batch of the next.
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
    """A simulated ``RingArena``, with the times at which slots are freed instead of waiting."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = nbytes
        self._live: deque[tuple[int, float]] = deque()  # (offset, when it is freed), oldest first
        self._end = 0
        self._now = 0.0
        self._taken: int | None = None  # the offset of the slot whose end is not known yet

    def take(self, nbytes: int) -> float:
        """The time at which the next slot is available."""
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
        """Let the slot that was taken last be freed at that time."""
        if self._taken is not None:
            self._live.append((self._taken, at))

    def _settle(self) -> None:
        # A slot that is freed before an older one is available only after that one.
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
