"""Spans of work and waiting, per stage: what the pipeline did with its time."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from layerstream.stages.forecast import Forecast

__all__ = [
    "SPANS_KEPT",
    "Clock",
    "Doing",
    "Gauge",
    "Occupancy",
    "Span",
    "StageTimings",
    "SweepSpan",
    "Timings",
]

# Spans kept per stage and ring: some tens of sweeps of a large model, and about a megabyte.
SPANS_KEPT = 8192
# Work kept whose times the device has still to tell. A GPU's queue holds about so many kernels before whoever
# gives it more is made to wait; what is older was given to a device that has failed.
_UNCOUNTED_KEPT = 1024
# Asked about no sooner than there is so much of it, or somebody wants to know: not for each batch anew.
_COUNTED_TOGETHER = 64


class Doing(StrEnum):
    """What a stage, or a slot, spends its time on."""

    WAITING_IN = "waiting in"  # for the stage before it: this stage is faster
    WORKING = "working"
    WAITING_OUT = "waiting out"  # for room, or for the stage after it: this stage is ahead
    HOLDING = "holding"  # what a slot does


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time of one stage; those of a stage do not overlap. Times are ``time.perf_counter``'s."""

    doing: Doing
    batch: int  # index of the layer batch; -1 where none is at hand yet
    start_seconds: float
    stop_seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimings:
    """Sums over all spans of one stage since the pipeline was opened, and the latest spans themselves.

    Work that is given to a GPU counts when it is done, and for as long as the GPU took.
    """

    name: str
    items: int  # layer batches on which the stage had work to do
    bytes: int  # read from disk, copied, or handed to computation
    busy_seconds: float
    waited_in_seconds: float  # high: the stage before this one holds things back
    waited_out_seconds: float  # high: the stage after this one, or memory, holds things back
    spans: tuple[Span, ...] = field(default=(), repr=False)  # oldest first

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second of work; 0 before any."""
        return self.bytes / self.busy_seconds if self.busy_seconds else 0.0

    def between(self, start_seconds: float, stop_seconds: float) -> "StageTimings":
        """The sums of what the kept spans say of the time between; bytes count as evenly spread over a span."""
        seconds, nbytes, items, kept = dict.fromkeys(Doing, 0.0), 0.0, 0, []
        for span in self.spans:
            start = max(span.start_seconds, start_seconds)
            stop = min(span.stop_seconds, stop_seconds)
            whole = span.stop_seconds - span.start_seconds
            if start > stop or (start == stop and whole):
                continue
            seconds[span.doing] += stop - start
            share = span.nbytes * ((stop - start) / whole if whole else 1.0)
            nbytes += share
            items += span.doing is Doing.WORKING and stop == span.stop_seconds
            kept.append(replace(span, start_seconds=start, stop_seconds=stop, nbytes=round(share)))
        return StageTimings(
            name=self.name,
            items=items,
            bytes=round(nbytes),
            busy_seconds=seconds[Doing.WORKING],
            waited_in_seconds=seconds[Doing.WAITING_IN],
            waited_out_seconds=seconds[Doing.WAITING_OUT],
            spans=tuple(kept),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSpan:
    """A sweep that was completed. Times are ``time.perf_counter``'s."""

    start_seconds: float
    stop_seconds: float
    # Of the one forward pass in it; None where there were several, or nobody said.
    tokens: int | None
    steady: bool  # it was neither the first, nor did it load residents


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """How full a ring of slots has been since the pipeline was opened.

    Full on the host while computation waits: the disk is ahead of the copies. Next to empty: each batch is
    computed with as soon as it is there. Behind a queue of one batch there is no more to tell than that.
    """

    name: str
    capacity_bytes: int
    mean_bytes: float  # over time
    peak_bytes: int
    spans: tuple[Span, ...] = field(default=(), repr=False)  # the latest slots that were given back


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What the three stages did: the answer to what holds a sweep back."""

    sweeps: int  # sweeps that were completed
    wall_seconds: float  # from when the pipeline was opened to the end of the last span
    stages: tuple[StageTimings, ...]
    start_seconds: float = 0.0  # when it was opened, by ``time.perf_counter``
    labels: tuple[str, ...] = ()  # the layers of each layer batch
    occupancy: tuple[Occupancy, ...] = ()
    latest: tuple[SweepSpan, ...] = ()  # the latest sweeps, oldest first
    # What the plan had said; None where there is no plan, or no sweep yet.
    forecast: Forecast | None = None

    @property
    def overlap_efficiency(self) -> float:
        """The longest stage's busy time by the time that passed: 1.0 when all else is hidden behind it."""
        busiest = max((stage.busy_seconds for stage in self.stages), default=0.0)
        return busiest / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def complete_since_seconds(self) -> float:
        """From when on all spans are there: of a long run only the latest are kept."""
        full = [stage.spans[0] for stage in self.stages if len(stage.spans) >= SPANS_KEPT]
        return max((span.start_seconds for span in full), default=self.start_seconds)

    def between(self, start_seconds: float, stop_seconds: float, *, sweeps: int) -> "Timings":
        """The same for a stretch of time in which the caller has counted ``sweeps``.

        Times are ``time.perf_counter``'s; occupancy stays that of the whole run, and there is no forecast.
        """
        return replace(
            self,
            forecast=None,
            sweeps=sweeps,
            start_seconds=start_seconds,
            wall_seconds=stop_seconds - start_seconds,
            stages=tuple(stage.between(start_seconds, stop_seconds) for stage in self.stages),
        )

    def summary(self) -> str:
        """A line for each stage, how well they overlap, and what to change, in words."""
        from layerstream.stages.bottleneck import summarize

        return summarize(self)

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the spans as Chrome trace events, which https://ui.perfetto.dev opens.

        Raises:
            OSError: the file cannot be written.
        """
        from layerstream.stages.trace import write_trace

        write_trace(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The sums as plain data for JSON; each key carries its unit. The spans are for ``write_trace``."""
        stages = [asdict(replace(stage, spans=())) for stage in self.stages]
        occupancy = [asdict(replace(ring, spans=())) for ring in self.occupancy]
        for each in (*stages, *occupancy):
            del each["spans"]
        return {
            "sweeps": self.sweeps,
            "wall_seconds": self.wall_seconds,
            "overlap_efficiency": self.overlap_efficiency,
            "stages": stages,
            "occupancy": occupancy,
            "forecast": self.forecast.to_dict() if self.forecast is not None else None,
        }


class Gauge:
    """How much of something is in use: its mean over time, and its peak."""

    def __init__(self) -> None:
        self.peak = 0
        self._amount = 0
        self._area = 0.0
        self._opened = self._changed = time.perf_counter()

    def change(self, by: int) -> float:
        """Count ``by`` more in use, or less; returns the present, by ``time.perf_counter``."""
        now = time.perf_counter()
        self._area += self._amount * (now - self._changed)
        self._changed = now
        self._amount += by
        self.peak = max(self.peak, self._amount)
        return now

    def mean(self) -> float:
        """The mean over the time since this was made."""
        self.change(0)
        return self._area / max(self._changed - self._opened, 1e-9)


class Clock:
    """Collects the spans of one stage. Sums are exact; of the spans themselves the latest are kept.

    A span costs a microsecond or two, and a layer batch has less than ten: it can always be on.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.spans: deque[Span] = deque(maxlen=SPANS_KEPT)
        self._seconds = dict.fromkeys(Doing, 0.0)
        self._items = 0
        self._bytes = 0
        self._uncounted: deque[Callable[[Clock], bool]] = deque(maxlen=_UNCOUNTED_KEPT)
        self._counting = threading.Lock()  # whoever asks for timings, in any thread, counts
        self.stopped = 0.0  # when the last span ended

    def later(self, count: Callable[["Clock"], bool]) -> None:
        """Have ``count`` add its spans here when the device can tell their times; it says whether that was so.

        Asked in the order given, when there are many, or somebody wants the sums. Of a device that has failed,
        the oldest are let go.
        """
        self._uncounted.append(count)
        if len(self._uncounted) >= _COUNTED_TOGETHER:
            self._count()

    def _count(self) -> None:
        with self._counting:
            while self._uncounted and self._uncounted[0](self):
                self._uncounted.popleft()

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
        self.stopped = max(self.stopped, stop)
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
        """The sums so far, and the spans that are kept."""
        self._count()
        return StageTimings(
            name=self.name,
            items=self._items,
            bytes=self._bytes,
            busy_seconds=self._seconds[Doing.WORKING],
            waited_in_seconds=self._seconds[Doing.WAITING_IN],
            waited_out_seconds=self._seconds[Doing.WAITING_OUT],
            spans=tuple(self.spans),
        )
