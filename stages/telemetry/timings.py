"""What the pipeline did with its time: the sums of each stage, and what holds the sweeps back. Plain data."""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from layerstream.stages.telemetry.bottleneck import (
    Bottleneck,
    find_bottleneck,
    overlap_efficiency,
)
from layerstream.stages.telemetry.forecast import PredictionCheck
from layerstream.stages.telemetry.spans import (
    SPANS_KEPT,
    ExpertCounts,
    Occupancy,
    StageTimings,
    SweepSpan,
)
from layerstream.stages.telemetry.trace import lanes, write_trace
from layerstream.stages.text import format_bytes

__all__ = ["Timings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What the three stages did, and so which of them holds a sweep back."""

    sweeps: int
    """Sweeps that were completed."""
    wall_seconds: float
    """From when the pipeline was opened to the end of the last span."""
    stages: tuple[StageTimings, ...]
    start_seconds: float = 0.0
    """When it was opened, by ``time.perf_counter``."""
    labels: tuple[str, ...] = ()
    """The layers of each layer batch."""
    occupancy: tuple[Occupancy, ...] = ()
    latest: tuple[SweepSpan, ...] = ()
    """The latest sweeps, oldest first."""
    experts: ExpertCounts | None = None
    """Of experts that are read on demand, in the whole run; None if there are none."""
    unpacking: StageTimings | None = None
    """Of packed weights, while the compute stage was busy: an item for each tile; None if there are no tiles."""
    forecast: PredictionCheck | None = None
    """The plan's predictions for the same sweeps; None for a part of a run."""

    @property
    def overlap_efficiency(self) -> float:
        """The busiest stage's busy time divided by the time that passed: 1.0 if all else is hidden behind it."""
        return overlap_efficiency(self.stages, wall_seconds=self.wall_seconds)

    @property
    def complete_since_seconds(self) -> float:
        """When the oldest span begins that is kept of every stage: of a long run only the latest are."""
        kept = [*self.stages, *([self.unpacking] if self.unpacking else [])]
        full = [stage.spans[0] for stage in kept if len(stage.spans) >= SPANS_KEPT]
        return max((span.start_seconds for span in full), default=self.start_seconds)

    def between(self, start_seconds: float, stop_seconds: float, *, sweeps: int) -> "Timings":
        """The same for a part of the time, in which the caller has counted ``sweeps``.

        Times are ``time.perf_counter``'s. Occupancy stays that of the whole run, and predictions are left out.
        """
        return replace(
            self,
            forecast=None,
            sweeps=sweeps,
            start_seconds=start_seconds,
            wall_seconds=stop_seconds - start_seconds,
            stages=tuple(stage.between(start_seconds, stop_seconds) for stage in self.stages),
            unpacking=self.unpacking and self.unpacking.between(start_seconds, stop_seconds),
        )

    def bottleneck(self) -> Bottleneck:
        """What takes the largest part of the time, and what to change."""
        return find_bottleneck(self.stages, wall_seconds=self.wall_seconds)

    def summary(self) -> str:
        """In words: a line for each stage, how well they overlap, how full the slots were, and the bottleneck."""
        lines = [f"{self.sweeps} sweeps in {self.wall_seconds:.2f} s"]
        lines += [_stage_line(stage) for stage in self.stages]
        if self.unpacking is not None and self.unpacking.items:
            lines.append(
                f"unpacking, while computing: busy {self.unpacking.busy_seconds:.2f} s, "
                f"{format_bytes(self.unpacking.bytes)} of packed weights"
            )
        lines += [
            f"{each.name}: {format_bytes(each.mean_bytes)} of {format_bytes(each.capacity_bytes)} "
            f"in use on average, {format_bytes(each.peak_bytes)} at most"
            for each in self.occupancy
        ]
        if (experts := self.experts) is not None and experts.wanted:
            lines.append(
                f"experts: {experts.hits} of {experts.wanted} were in memory ({experts.hit_share:.0%}), "
                f"{format_bytes(experts.read_bytes)} read on demand, waited {experts.wait_seconds:.2f} s"
            )
        if self.forecast is not None and self.forecast.sweeps:
            lines += self.forecast.lines()
        lines.append(f"overlap efficiency {self.overlap_efficiency:.2f}")
        return "\n".join([*lines, f"bottleneck: {self.bottleneck().sentence}"])

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the spans as Chrome trace events, which https://ui.perfetto.dev opens.

        Raises:
            OSError: The file cannot be written.
        """
        tracks = [(stage.name, stage.spans) for stage in self.stages]
        for ring in self.occupancy:
            tracks += [(f"{ring.name} {n}", lane) for n, lane in enumerate(lanes(ring.spans), 1)]
        if self.unpacking is not None:
            spans = self.unpacking.spans
            tracks += [(f"unpack {n}", lane) for n, lane in enumerate(lanes(spans), 1)]
        write_trace(path, tracks, labels=self.labels, start_seconds=self.start_seconds)

    def to_dict(self) -> dict[str, Any]:
        """The sums as plain data for JSON; each key names its unit. The spans are for ``write_trace``."""
        stages = [asdict(replace(stage, spans=())) for stage in self.stages]
        occupancy = [asdict(replace(ring, spans=())) for ring in self.occupancy]
        unpacking = [asdict(replace(self.unpacking, spans=()))] if self.unpacking else []
        for each in (*stages, *occupancy, *unpacking):
            del each["spans"]
        return {
            "sweeps": self.sweeps,
            "wall_seconds": self.wall_seconds,
            "overlap_efficiency": self.overlap_efficiency,
            "stages": stages,
            "unpacking": unpacking[0] if unpacking else None,
            "occupancy": occupancy,
            "experts": asdict(self.experts) if self.experts is not None else None,
            "forecast": self.forecast.to_dict() if self.forecast is not None else None,
        }


def _stage_line(stage: StageTimings) -> str:
    return (
        f"{stage.name:>8}: busy {stage.busy_seconds:.2f} s, waited in {stage.waited_in_seconds:.2f} s, "
        f"waited out {stage.waited_out_seconds:.2f} s, {stage.items} batches, "
        f"{format_bytes(stage.bytes)}, {format_bytes(stage.bytes_per_second)}/s"
    )
