"""Plots with matplotlib: the stages as a timeline, and bar charts that compare."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerstream.stages.errors import LayerstreamError
from layerstream.stages.telemetry.spans import Activity
from layerstream.stages.telemetry.timings import Timings

__all__ = ["require_matplotlib", "write_bar_chart", "write_timeline"]

# They also differ in lightness, for readers who cannot tell red from green.
_COLOURS = {
    Activity.WORKING: "#1f5fa8",
    Activity.WAITING_IN: "#f2b84b",
    Activity.WAITING_OUT: "#d9d9d9",
}


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        LayerstreamError: It is not.
    """
    _figure_class()


def write_timeline(timings: Timings, path: Path) -> None:
    """Draw a row for each stage, with its work and its waiting; the suffix of ``path`` decides the format."""
    figure = _figure_class()(figsize=(12, 1.2 + 0.7 * len(timings.stages)), layout="constrained")
    axes = figure.add_subplot()
    for row, stage in enumerate(timings.stages):
        for activity, colour in _COLOURS.items():
            bars = [
                (span.start_seconds - timings.start_seconds, span.stop_seconds - span.start_seconds)
                for span in stage.spans
                if span.activity is activity
            ]
            label = str(activity) if row == 0 else None
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, label=label)
    axes.set_yticks(range(len(timings.stages)), [stage.name for stage in timings.stages])
    axes.invert_yaxis()
    axes.set_xlim(0, max(timings.wall_seconds, 1e-6))
    axes.set_xlabel("seconds since the pipeline was opened")
    axes.set_title(f"overlap efficiency {timings.overlap_efficiency:.2f}", loc="left")
    figure.legend(loc="outside upper right", ncols=len(_COLOURS), frameon=False)
    figure.savefig(path, dpi=120)


def write_bar_chart(
    series: Mapping[str, Sequence[tuple[str, float, float, float]]],
    path: Path,
    *,
    labels: Sequence[str],
    title: str,
    unit: str,
) -> None:
    """Draw panels side by side, with a bar for each row; the suffix of ``path`` decides the format.

    Args:
        series: For each panel's name its rows: label, length of the bar, and both ends of its error bar.
        path: The file.
        labels: Labels of all rows, from the top.
        title: Title over all panels.
        unit: Unit of the lengths.
    """
    figure = _figure_class()(figsize=(10, 1.6 + 0.4 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(panels, series.items(), strict=True):
        places = [labels.index(label) for label, *_ in rows]
        lengths = [length for _, length, _, _ in rows]
        spreads = ([row[1] - row[2] for row in rows], [row[3] - row[1] for row in rows])
        colour = _COLOURS[Activity.WORKING]
        axes.barh(places, lengths, xerr=spreads, color=colour, ecolor="#333333", capsize=3)
        for place, length, most in zip(places, lengths, (row[3] for row in rows), strict=True):
            axes.annotate(
                f"{length:.3g}", (most, place), (6, 0), textcoords="offset points", va="center"
            )
        axes.margins(x=0.15)
        axes.set_xlabel(f"{name}, {unit}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    figure.savefig(path, dpi=90)


def _figure_class() -> Any:
    try:
        # Imported by name, since type checkers may not have it.
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise LayerstreamError(
            "--plot needs matplotlib, which is not installed; install layerstream[plot]"
        ) from error
