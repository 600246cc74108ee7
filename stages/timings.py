"""Spans of work and waiting, per stage: what the pipeline did with its time. Plain data."""

import os
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from layerstream.stages.forecast import Forecast

__all__ = [
    "SPANS_KEPT",
    "Doing",
    "Occupancy",
    "Span",
    "StageTimings",
    "SweepSpan",
    "Timings",
]

# Spans kept per stage and ring: some tens of sweeps of a large model, and about a megabyte.
SPANS_KEPT = 8192


class Doing(StrEnum):
    """What a stage, or a slot, spends its time on."""

    WAITING_IN = "waiting in"  # for the stage before it: this stage is faster
    WORKING = "working"
    WAITING_OUT = "waiting out"  # for room, or for the stage after it: this stage is ahead
    HOLDING = "holding"  # what a slot does


@dataclass(frozen=True, slots=True)
class Span:
    """What one stage, or a slot, did for some time, by ``time.perf_counter``. Spans of a stage do not overlap."""

    doing: Doing
    batch: int  # index of the layer batch; -1 if unknown
    start_seconds: float
    stop_seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimings:
    """Sums over all spans of one stage since the pipeline was opened, and the latest spans themselves.

    Work of a GPU counts once it is finished, and with the time that the GPU took.
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
        """The same for a part of the time, from the spans that are kept; a span's bytes count in proportion."""
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
    tokens: int | None  # of the forward pass in it; None if there were several, or if it is unknown
    steady: bool  # it was not the first and loaded no residents


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """How full a ring of slots has been since the pipeline was opened.

    A full host ring while computation waits means that reading is ahead of the copies. An almost empty one
    means that each batch is computed with as soon as it is there.
    """

    name: str
    capacity_bytes: int
    mean_bytes: float  # over time
    peak_bytes: int
    spans: tuple[Span, ...] = field(default=(), repr=False)  # the latest slots that were given back


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What the three stages did, and so which of them holds a sweep back."""

    sweeps: int  # sweeps that were completed
    wall_seconds: float  # from when the pipeline was opened to the end of the last span
    stages: tuple[StageTimings, ...]
    start_seconds: float = 0.0  # when it was opened, by ``time.perf_counter``
    labels: tuple[str, ...] = ()  # the layers of each layer batch
    occupancy: tuple[Occupancy, ...] = ()
    latest: tuple[SweepSpan, ...] = ()  # the latest sweeps, oldest first
    # The plan's predictions for the same sweeps; None for a part of a run.
    forecast: Forecast | None = None

    @property
    def overlap_efficiency(self) -> float:
        """The busiest stage's busy time divided by the time that passed: 1.0 if all else is hidden behind it."""
        busiest = max((stage.busy_seconds for stage in self.stages), default=0.0)
        return busiest / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def complete_since_seconds(self) -> float:
        """When the oldest span begins that is kept of every stage: of a long run only the latest are."""
        full = [stage.spans[0] for stage in self.stages if len(stage.spans) >= SPANS_KEPT]
        return max((span.start_seconds for span in full), default=self.start_seconds)

    def between(self, start_seconds: float, stop_seconds: float, *, sweeps: int) -> "Timings":
        """The same for a part of the time, in which the caller has counted ``sweeps``.

        Times are ``time.perf_counter``'s. Occupancy stays that of the whole run, and there is no forecast.
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
        """In words: a line for each stage, how well they overlap, and what to change."""
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
