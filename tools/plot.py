"""The stages as a timeline, drawn with matplotlib."""

import importlib
from pathlib import Path
from typing import Any

from layerstream.stages.errors import LayerstreamError
from layerstream.stages.timings import Doing, Timings

__all__ = ["check_plot", "write_plot"]

# Told apart by lightness too, and by those who do not see red or green.
_COLOURS = {
    Doing.WORKING: "#1f5fa8",
    Doing.WAITING_IN: "#f2b84b",
    Doing.WAITING_OUT: "#d9d9d9",
}


def check_plot() -> None:
    """Refuse to draw where matplotlib is missing.

    Raises:
        LayerstreamError: it is.
    """
    _figure_class()


def write_plot(timings: Timings, path: Path) -> None:
    """Draw a row for each stage, with its work and its waiting, to a file of the kind that its suffix says."""
    figure = _figure_class()(figsize=(12, 1.2 + 0.7 * len(timings.stages)), layout="constrained")
    axes = figure.add_subplot()
    for row, stage in enumerate(timings.stages):
        for doing, colour in _COLOURS.items():
            bars = [
                (span.start_seconds - timings.start_seconds, span.stop_seconds - span.start_seconds)
                for span in stage.spans
                if span.doing is doing
            ]
            label = str(doing) if row == 0 else None
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, label=label)
    axes.set_yticks(range(len(timings.stages)), [stage.name for stage in timings.stages])
    axes.invert_yaxis()
    axes.set_xlim(0, max(timings.wall_seconds, 1e-6))
    axes.set_xlabel("seconds since the pipeline was opened")
    axes.set_title(f"overlap efficiency {timings.overlap_efficiency:.2f}", loc="left")
    figure.legend(loc="outside upper right", ncols=len(_COLOURS), frameon=False)
    figure.savefig(path, dpi=120)


def _figure_class() -> Any:
    try:
        # By name: type checkers need not have it.
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise LayerstreamError(
            "--plot needs matplotlib, which is not installed; install layerstream[plot]"
        ) from error
