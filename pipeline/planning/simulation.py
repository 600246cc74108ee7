"""The time of sweeps: a simulation of the three stages for one plan. Pure.

The design's formula, ``max(D / disk, H / h2d, C) + batches x overhead``, holds for stages that never wait
for one another. With few slots and batches of different sizes they do wait; so each batch is followed through the
stages here, as in the pipeline, with times instead of bytes.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerstream.pipeline.planning.prediction import SweepPrediction

__all__ = ["BatchCost", "simulate"]

# How many batches may be in flight besides the one that is computed with, however large the rings are: two in
# the read stage, one on its way into the queue behind it, one in each of the two queues, one being copied.
_BATCHES_AHEAD = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCost:
    """The time that one layer batch takes in each stage of one sweep."""

    read_seconds: float = 0.0
    copy_seconds: float = 0.0
    compute_seconds: float = 0.0
    host_bytes: int = 0
    """Of its slot in the host ring; 0: it takes none."""
    device_bytes: int = 0
    """Of its slot in the device ring; 0: it takes none."""
    copied_away: bool = False
    """Whether the host slot is free after the copy, not after the computation."""
    expert_seconds: float = 0.0
    """Of reading experts on demand, for which the reads of later batches make way."""
    expert_copy_seconds: float = 0.0
    """Of copying them to a GPU, each when it has been read."""
    expert_wait_seconds: float = 0.0
    """How long computation waits for that."""


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
        sweeps: The batches of each; prefetch runs on from one sweep to the next.
        host_ring_bytes: Size of the ring of host slots.
        device_ring_bytes: Size of the ring of device slots.
        overhead_seconds: Time that computation spends on the hand-off of each batch.
        between_seconds: Time from the end of a sweep until computation needs the first batch of the next.
    """
    host, device = _Ring(host_ring_bytes), _Ring(device_ring_bytes)
    # The times at which the latest batch was read, copied and computed.
    read = copied = computed = 0.0
    # When computation began with each of the last few batches.
    begun: deque[float] = deque([0.0] * _BATCHES_AHEAD, maxlen=_BATCHES_AHEAD)
    predictions = []
    for batches in sweeps:
        start = computed
        ready = computed + between_seconds
        for batch in batches:
            may_read = max(host.take(batch.host_bytes), begun[0])
            read = max(read, may_read) + batch.read_seconds
            may_copy = max(copied, read, device.take(batch.device_bytes))
            copied = may_copy + batch.copy_seconds
            began = max(ready, copied)
            if batch.expert_seconds:
                read = max(read, began) + batch.expert_seconds
            working = overhead_seconds + batch.compute_seconds
            ready = computed = began + working + batch.expert_wait_seconds
            begun.append(began)
            host.free(copied if batch.copied_away else computed)
            device.free(computed)
        predictions.append(
            SweepPrediction(
                seconds=computed - start,
                read_seconds=sum(batch.read_seconds + batch.expert_seconds for batch in batches),
                transfer_seconds=sum(
                    batch.copy_seconds + batch.expert_copy_seconds for batch in batches
                ),
                compute_seconds=sum(batch.compute_seconds for batch in batches),
                overhead_seconds=len(batches) * overhead_seconds + between_seconds,
            )
        )
    return predictions


class _Ring:
    """A simulated ``RingArena``: instead of waiting for slots, it returns the time at which they are free."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = nbytes
        # The offset of each slot in use and the time at which it is freed, the oldest first.
        self._live: deque[tuple[int, float]] = deque()
        self._end = 0
        self._now = 0.0
        self._taken: int | None = None  # the offset of the slot that is not freed yet

    def take(self, nbytes: int) -> float:
        """The time at which the next slot is available."""
        self._taken = None
        if not nbytes:
            return 0.0
        self._expire()
        while (offset := self._find(nbytes)) is None:
            self._now = max(self._now, self._live[0][1])
            self._expire()
        self._taken, self._end = offset, offset + nbytes
        return self._now

    def free(self, at_seconds: float) -> None:
        """Free the slot that was taken last at that time."""
        if self._taken is not None:
            self._live.append((self._taken, at_seconds))

    def _expire(self) -> None:
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
