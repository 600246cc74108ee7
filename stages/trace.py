"""Spans as Chrome trace events, which Perfetto and chrome://tracing open.

The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerstream.stages.timings import Doing, Span, Timings

__all__ = ["trace_events", "write_trace"]

_PROCESS = 1


def write_trace(timings: Timings, path: str | os.PathLike[str]) -> None:
    """Write the spans of ``timings`` to the file at ``path``, as JSON."""
    trace = {"displayTimeUnit": "ms", "traceEvents": list(trace_events(timings))}
    Path(path).write_text(json.dumps(trace), encoding="utf-8")


def trace_events(timings: Timings) -> Iterator[dict[str, Any]]:
    """Tracks for each stage and each slot, of complete events in microseconds from the start."""
    yield _metadata("process_name", name="layerstream")
    tracks = [(stage.name, stage.spans) for stage in timings.stages]
    for ring in timings.occupancy:
        lanes = enumerate(_lanes(ring.spans), start=1)
        tracks += [(f"{ring.name} {number}", lane) for number, lane in lanes]
    for track, (name, spans) in enumerate(tracks, start=1):
        yield _metadata("thread_name", track, name=name)
        yield _metadata("thread_sort_index", track, sort_index=track)
        for span in spans:
            begin = _nanoseconds(span.start_seconds - timings.start_seconds)
            end = _nanoseconds(span.stop_seconds - timings.start_seconds)
            yield {
                "name": _name(span, timings.labels),
                "cat": str(span.doing),
                "ph": "X",
                "pid": _PROCESS,
                "tid": track,
                "ts": begin / 1000,
                "dur": (end - begin) / 1000,
                "args": {"batch": span.batch, "bytes": span.nbytes},
            }


def _lanes(spans: tuple[Span, ...]) -> list[tuple[Span, ...]]:
    """``spans`` on as few tracks as they fit without overlaps: a ring has slots of any size and place."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start_seconds):
        for lane in lanes:
            if lane[-1].stop_seconds <= span.start_seconds:
                lane.append(span)
                break
        else:
            lanes.append([span])
    return [tuple(lane) for lane in lanes]


def _metadata(kind: str, track: int = 0, **args: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": track, "args": args}


def _nanoseconds(seconds: float) -> int:
    # Whole numbers, so that where one span ends the next one begins.
    return round(seconds * 1e9)


def _name(span: Span, labels: tuple[str, ...]) -> str:
    layers = f" {labels[span.batch]}" if 0 <= span.batch < len(labels) else ""
    batch = f"{span.batch}{layers}" if span.batch >= 0 else ""
    return (
        batch if span.doing in {Doing.WORKING, Doing.HOLDING} else f"{span.doing} {batch}".rstrip()
    )
