"""A trace in which copies and kernels overlap: torch's profiler, its Chrome trace, and a picture of it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from layerstream.tools.benchmarks.copying import Accelerator

__all__ = ["Lanes", "Span", "overlap_of", "picture", "trace"]

Span = tuple[float, float]  # from, to, in microseconds of the trace
Lanes = tuple[list[Span], list[Span]]  # of copies, and of kernels

_WIDTH, _LANE, _LEFT = 1200, 40, 90


@contextmanager
def trace(accelerator: Accelerator, *, path: Path) -> Iterator[Lanes]:
    """Profile the body and write its Chrome trace; behind it, the lanes are filled.

    Rehearsing, the processor's own fills and products play their parts.
    """
    lanes: Lanes = ([], [])
    activity = ProfilerActivity.CUDA if accelerator.is_gpu else ProfilerActivity.CPU
    # On a GPU every thread's kernels are seen anyhow; on a CPU only those of threads asked for.
    every_thread = _ExperimentalConfig(profile_all_threads=not accelerator.is_gpu)
    with profile(activities=[activity], experimental_config=every_thread) as profiler:
        yield lanes
        accelerator.synchronize()
    profiler.export_chrome_trace(str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    events = document["traceEvents"]
    if accelerator.is_gpu:
        # The calls that launch them, some thousands too, would make a file of tens of megabytes.
        kept = {"gpu_memcpy", "kernel"}
        document["traceEvents"] = [e for e in events if e.get("ph") == "M" or e.get("cat") in kept]
        path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
        lanes[0].extend(
            _spans(e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"])
        )
        lanes[1].extend(_spans(e for e in events if e.get("cat") == "kernel"))
    else:
        lanes[0].extend(_spans(e for e in events if e.get("name") == "aten::fill_"))
        lanes[1].extend(_spans(e for e in events if e.get("name") == "aten::mm"))


def _spans(events: Iterable[dict[str, Any]]) -> list[Span]:
    """The spans of ``events``, joined where they touch."""
    return _joined(sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X"))


def _joined(spans: Sequence[Span], *, gap: float = 0.0) -> list[Span]:
    joined: list[Span] = []
    for start, stop in spans:
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


def overlap_of(copies: Sequence[Span], kernels: Sequence[Span]) -> float:
    """The part of the kernels' time in which a copy ran too; 0 where no kernel ran."""
    both = sum(
        max(0.0, min(stop, other_stop) - max(start, other_start))
        for start, stop in kernels
        for other_start, other_stop in copies
    )
    busy = sum(stop - start for start, stop in kernels)
    return both / busy if busy else 0.0


def picture(copies: Sequence[Span], kernels: Sequence[Span], *, title: str) -> str:
    """The two lanes as an SVG document."""
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
            # Thousands of kernels with microseconds between them would make megabytes of picture.
            for start, stop in _joined(drawn, gap=0.1 / scale)
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="150" '
        f'font-family="sans-serif" font-size="13">\n<text x="5" y="20">{title}</text>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )
