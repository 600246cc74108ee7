"""Spans of work and waiting, per stage: what the pipeline did with its time."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Clock", "Doing", "Span", "StageTimings", "Timings"]

# Spans kept per stage: a few hundred sweeps of a large model, and about a megabyte.
_SPANS_KEPT = 8192


class Doing(StrEnum):
    """What a stage spends its time on."""

    WAITING_IN = "waiting in"  # for the stage before it: this stage is faster
    WORKING = "working"
    WAITING_OUT = "waiting out"  # for room, or for the stage after it: this stage is ahead


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time of one stage. Times are ``time.perf_counter`` seconds."""

    doing: Doing
    batch: int  # index of the layer batch; -1 where none is at hand yet
    start_seconds: float
    stop_seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimings:
    """Sums over all spans of one stage since the pipeline was opened or its timings were reset."""

    name: str
    items: int  # layer batches on which the stage had work to do
    bytes: int  # read from disk, copied, or handed to computation
    busy_seconds: float
    waited_in_seconds: float  # high: the stage before this one holds things back
    waited_out_seconds: float  # high: the stage after this one, or memory, holds things back

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second of work; 0 before any."""
        return self.bytes / self.busy_seconds if self.busy_seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What the three stages did: the answer to what holds a sweep back."""

    sweeps: int  # sweeps that were completed
    wall_seconds: float  # from the first work to the last
    stages: tuple[StageTimings, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON; each key carries its unit."""
        return asdict(self)


class Clock:
    """Collects the spans of one stage. Sums are exact; of the spans themselves the latest are kept."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spans: deque[Span] = deque(maxlen=_SPANS_KEPT)
        self._seconds = dict.fromkeys(Doing, 0.0)
        self._items = 0
        self._bytes = 0

    def add(
        self,
        doing: Doing,
        start: float,
        stop: float | None = None,
        *,
        batch: int = -1,
        nbytes: int = 0,
    ) -> float:
        """Count the time from ``start`` to ``stop`` (now, if not given); returns the latter."""
        if stop is None:
            stop = time.perf_counter()
        self._seconds[doing] += stop - start
        if doing is Doing.WORKING:
            self._items += 1
            self._bytes += nbytes
        self.spans.append(Span(doing, batch, start, stop, nbytes))
        return stop

    @contextmanager
    def span(self, doing: Doing, *, batch: int = -1, nbytes: int = 0) -> Iterator[None]:
        """Count the time that the body takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(doing, start, batch=batch, nbytes=nbytes)

    def sums(self) -> StageTimings:
        """The sums so far."""
        return StageTimings(
            name=self.name,
            items=self._items,
            bytes=self._bytes,
            busy_seconds=self._seconds[Doing.WORKING],
            waited_in_seconds=self._seconds[Doing.WAITING_IN],
            waited_out_seconds=self._seconds[Doing.WAITING_OUT],
        )
