"""Spans as Chrome trace events, which Perfetto and chrome://tracing open.

The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layerstream.stages.telemetry.spans import Activity, Span

__all__ = ["lanes", "trace_events", "write_trace"]

_PROCESS = 1


def write_trace(
    path: str | os.PathLike[str],
    tracks: Sequence[tuple[str, Sequence[Span]]],
    *,
    labels: Sequence[str],
    start_seconds: float,
) -> None:
    """Write ``tracks`` to the file at ``path``, as JSON. Arguments are those of ``trace_events``.

    Raises:
        OSError: The file cannot be written; none is left.
    """
    path = Path(path)
    events = list(trace_events(tracks, labels=labels, start_seconds=start_seconds))
    trace = {"displayTimeUnit": "ms", "traceEvents": events}
    try:
        path.write_text(json.dumps(trace), encoding="utf-8")
    except OSError as error:
        if path.is_file():
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk has no name


def trace_events(
    tracks: Sequence[tuple[str, Sequence[Span]]], *, labels: Sequence[str], start_seconds: float
) -> Iterator[dict[str, Any]]:
    """Complete events in microseconds from the start, on tracks of their own.

    Args:
        tracks: Names, and spans that do not overlap.
        labels: The layers of each layer batch.
        start_seconds: When the pipeline was opened, by the clock of the spans.
    """
    yield _metadata("process_name", name="layerstream")
    for track, (name, spans) in enumerate(tracks, start=1):
        yield _metadata("thread_name", track, name=name)
        yield _metadata("thread_sort_index", track, sort_index=track)
        for span in spans:
            begin = _nanoseconds(span.start_seconds - start_seconds)
            end = _nanoseconds(span.stop_seconds - start_seconds)
            yield {
                "name": _event_name(span, labels),
                "cat": str(span.activity),
                "ph": "X",
                "pid": _PROCESS,
                "tid": track,
                "ts": begin / 1000,
                "dur": (end - begin) / 1000,
                "args": {"batch": span.batch, "bytes": span.nbytes},
            }


def lanes(spans: Iterable[Span]) -> list[tuple[Span, ...]]:
    """``spans`` on as few tracks as they fit without overlaps: a ring has slots of any size and place."""
    found: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start_seconds):
        for lane in found:
            if lane[-1].stop_seconds <= span.start_seconds:
                lane.append(span)
                break
        else:
            found.append([span])
    return [tuple(lane) for lane in found]


def _metadata(kind: str, track: int = 0, **args: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": track, "args": args}


def _nanoseconds(seconds: float) -> int:
    # Whole numbers, so that where one span ends the next one begins.
    return round(seconds * 1e9)


def _event_name(span: Span, labels: Sequence[str]) -> str:
    layers = f" {labels[span.batch]}" if 0 <= span.batch < len(labels) else ""
    batch = f"{span.batch}{layers}" if span.batch >= 0 else ""
    return (
        batch
        if span.activity in {Activity.WORKING, Activity.HOLDING}
        else f"{span.activity} {batch}".rstrip()
    )
