"""Traces copies and kernels with torch's profiler: a Chrome trace, the overlap, and a picture."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from layerstream.tools.benchmarks.accelerator import Accelerator

__all__ = ["Lanes", "Span", "draw_lanes", "overlap_share", "trace_lanes"]

Span = tuple[float, float]  # start and end, in microseconds of the trace
Lanes = tuple[list[Span], list[Span]]  # spans of copies, and of kernels

_WIDTH, _LANE, _LEFT = 1200, 40, 90


@contextmanager
def trace_lanes(accelerator: Accelerator, *, path: Path) -> Iterator[Lanes]:
    """Profile the block and write its Chrome trace; the yielded lanes are filled afterwards.

    In a rehearsal, fills and matrix products on the CPU stand in for copies and kernels.
    """
    lanes: Lanes = ([], [])
    activity = ProfilerActivity.CUDA if accelerator.is_gpu else ProfilerActivity.CPU
    # On a GPU the kernels of all threads are traced anyway; on a CPU this needs the option.
    every_thread = _ExperimentalConfig(profile_all_threads=not accelerator.is_gpu)
    with profile(activities=[activity], experimental_config=every_thread) as profiler:
        yield lanes
        accelerator.synchronize()
    profiler.export_chrome_trace(str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    events = document["traceEvents"]
    if accelerator.is_gpu:
        # The thousands of calls that launch them would make a file of tens of megabytes.
        categories = {"gpu_memcpy", "kernel"}
        document["traceEvents"] = [
            e for e in events if e.get("ph") == "M" or e.get("cat") in categories
        ]
        path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
        lanes[0].extend(
            _spans(e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"])
        )
        lanes[1].extend(_spans(e for e in events if e.get("cat") == "kernel"))
    else:
        lanes[0].extend(_spans(e for e in events if e.get("name") == "aten::fill_"))
        lanes[1].extend(_spans(e for e in events if e.get("name") == "aten::mm"))


def _spans(events: Iterable[dict[str, Any]]) -> list[Span]:
    """The spans of ``events``, merged where they meet."""
    return _merge(sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X"))


def _merge(spans: Sequence[Span], *, gap: float = 0.0) -> list[Span]:
    merged: list[Span] = []
    for start, stop in spans:
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def overlap_share(copies: Sequence[Span], kernels: Sequence[Span]) -> float:
    """The share of the kernels' time in which a copy ran too; 0 if no kernel ran."""
    both = sum(
        max(0.0, min(stop, other_stop) - max(start, other_start))
        for start, stop in kernels
        for other_start, other_stop in copies
    )
    busy = sum(stop - start for start, stop in kernels)
    return both / busy if busy else 0.0


def draw_lanes(copies: Sequence[Span], kernels: Sequence[Span], *, title: str) -> str:
    """Draw the two lanes as an SVG document."""
    spans = [*copies, *kernels]
    begin = min((start for start, _ in spans), default=0.0)
    scale = (_WIDTH - _LEFT - 10) / max(max((stop for _, stop in spans), default=1.0) - begin, 1e-9)
    shapes = []
    for lane, (name, colour, drawn) in enumerate(
        (("H2D copies", "#3572b0", copies), ("kernels", "#d98032", kernels))
    ):
        top = 40 + lane * (_LANE + 10)
        shapes.append(f'<text x="5" y="{top + _LANE / 2 + 4}">{name}</text>')
        shapes += [
            f'<rect x="{_LEFT + (start - begin) * scale:.2f}" y="{top}" '
            f'width="{max((stop - start) * scale, 0.3):.2f}" height="{_LANE}" fill="{colour}"/>'
            # Thousands of kernels with microseconds between them would make a picture of megabytes.
            for start, stop in _merge(drawn, gap=0.1 / scale)
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="150" '
        f'font-family="sans-serif" font-size="13">\n<text x="5" y="20">{title}</text>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )
