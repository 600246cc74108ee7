"""Spans of work and waiting of the stages, and their sums. Plain data."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

__all__ = [
    "SPANS_KEPT",
    "Activity",
    "ExpertCounts",
    "Occupancy",
    "Span",
    "StageTimings",
    "SweepSpan",
]

# Spans kept per stage and ring: some tens of sweeps of a large model, and about a megabyte.
SPANS_KEPT = 8192


class Activity(StrEnum):
    """What a stage, or a slot, spends its time on."""

    WAITING_IN = "waiting in"
    """For the stage before it: this stage is faster."""
    WORKING = "working"
    WAITING_OUT = "waiting out"
    """For memory, or for the stage after it: this stage is ahead."""
    HOLDING = "holding"
    """Of a slot: a batch is in it."""


@dataclass(frozen=True, slots=True)
class Span:
    """What one stage, or a slot, did for some time, by ``time.perf_counter``. Spans of a stage do not overlap."""

    activity: Activity
    batch: int
    """Index of the layer batch; -1 if unknown."""
    start_seconds: float
    stop_seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimings:
    """Sums over all spans of one stage since the pipeline was opened, and the latest spans themselves.

    Work of a GPU counts once it is finished, and with the time that the GPU took.
    """

    name: str
    items: int
    """Layer batches on which the stage had work to do."""
    bytes: int
    """Read from disk, copied, or handed to computation."""
    busy_seconds: float
    waited_in_seconds: float
    """High: the stage before this one holds things back."""
    waited_out_seconds: float
    """High: the stage after this one, or memory, holds things back."""
    spans: tuple[Span, ...] = field(default=(), repr=False)
    """Oldest first."""

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second of work; 0 before any."""
        return self.bytes / self.busy_seconds if self.busy_seconds else 0.0

    def between(self, start_seconds: float, stop_seconds: float) -> "StageTimings":
        """The same for a part of the time, from the spans that are kept; a span's bytes count in proportion."""
        seconds, nbytes, items, kept = dict.fromkeys(Activity, 0.0), 0.0, 0, []
        for span in self.spans:
            start = max(span.start_seconds, start_seconds)
            stop = min(span.stop_seconds, stop_seconds)
            whole = span.stop_seconds - span.start_seconds
            if start > stop or (start == stop and whole):
                continue
            seconds[span.activity] += stop - start
            share = span.nbytes * ((stop - start) / whole if whole else 1.0)
            nbytes += share
            items += span.activity is Activity.WORKING and stop == span.stop_seconds
            kept.append(replace(span, start_seconds=start, stop_seconds=stop, nbytes=round(share)))
        return StageTimings(
            name=self.name,
            items=items,
            bytes=round(nbytes),
            busy_seconds=seconds[Activity.WORKING],
            waited_in_seconds=seconds[Activity.WAITING_IN],
            waited_out_seconds=seconds[Activity.WAITING_OUT],
            spans=tuple(kept),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSpan:
    """A sweep that was completed. Times are ``time.perf_counter``'s."""

    start_seconds: float
    stop_seconds: float
    tokens: int | None
    """Of the forward pass in it; None if there were several, or if it is unknown."""
    steady: bool
    """It was not the first and loaded no residents."""
    expert_wait_seconds: float = 0.0
    """How long its passes have waited for experts, in sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """How full a ring of slots has been since the pipeline was opened.

    A full host ring while computation waits means that reading is ahead of the copies. An almost empty one
    means that each batch is computed with as soon as it arrives.
    """

    name: str
    capacity_bytes: int
    mean_bytes: float
    """Over time."""
    peak_bytes: int
    spans: tuple[Span, ...] = field(default=(), repr=False)
    """The latest slots that were given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCounts:
    """What the store has been asked for since it was opened."""

    wanted: int = 0
    """Experts that passes have asked for, each layer of each pass by itself."""
    hits: int = 0
    """Of those, the ones that were there or on their way."""
    read_bytes: int = 0
    wait_seconds: float = 0.0
    """How long passes have waited for experts, in sum."""

    @property
    def hit_share(self) -> float:
        """The share of hits; 0 before any were wanted."""
        return self.hits / self.wanted if self.wanted else 0.0
