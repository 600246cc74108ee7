"""Progress on stderr: a bar with rich in a terminal, else a line for every 10 %."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["late_progress", "progress", "waiting"]

_STEPS = 10
# Faster operations show no progress.
_QUIET_SECONDS = 2.0


@contextmanager
def progress(
    label: str, total: int, *, is_bytes: bool = False
) -> Iterator[Callable[[int], object]]:
    """Show how much of ``total`` is done; the block calls the yielded function with each increment.

    Nothing is shown before the first call, which may add 0.
    """
    bar = _bar(is_bytes=is_bytes)
    if bar is None:
        yield _PlainProgress(label, total)
        return

    def advance(count: int) -> None:
        if not bar.tasks:
            bar.start()
            bar.add_task(label, total=total)
        bar.advance(bar.tasks[0].id, count)

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def late_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Like ``progress``, but shows nothing in the first seconds, and takes the amount done so far."""
    began, shown = time.monotonic(), 0
    with progress(label, total) as advance:

        def reach(done: int) -> None:
            nonlocal shown
            if time.monotonic() - began > _QUIET_SECONDS and done > shown:
                advance(min(done, total) - shown)
                shown = min(done, total)

        yield reach


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Show an indeterminate progress bar while the block runs, once it has taken some seconds.

    It is shown in a terminal only: elsewhere, stderr is for errors, of one line each.
    """
    bar = _bar(is_bytes=False)
    if bar is None:
        yield
        return

    def show() -> None:
        bar.add_task(label, total=None)
        bar.start()

    # A thread, since the block may block an event loop.
    timer = threading.Timer(_QUIET_SECONDS, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def _bar(*, is_bytes: bool) -> Any:
    """A progress bar on stderr; None if that is no terminal, or rich is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich import progress as rich
        from rich.console import Console
    except ImportError:
        return None
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True) if is_bytes else rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # stdout is the command's result
    )


class _PlainProgress:
    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._step = 0

    def __call__(self, count: int) -> None:
        self._done += count
        step = self._done * _STEPS // self._total
        if step > self._step:
            self._step = step
            print(f"{self._label}: {step * 100 // _STEPS} %", file=sys.stderr, flush=True)
