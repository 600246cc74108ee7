"""Progress on stderr: a bar with rich in a terminal, else a line at every tenth."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]

_STEPS = 10


@contextmanager
def progress(
    label: str, total: int, *, is_bytes: bool = False
) -> Iterator[Callable[[int], object]]:
    """Show how much of ``total`` is done; the call that is handed out says how much was added.

    Nothing is shown before the first call, which may add nothing.
    """
    if not sys.stderr.isatty():
        yield _PlainProgress(label, total)
        return
    try:
        from rich import progress as rich
        from rich.console import Console
    except ImportError:
        yield _PlainProgress(label, total)
        return
    bar = rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True) if is_bytes else rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # what is printed there is the result, and not for stderr
    )

    def advance(count: int) -> None:
        if not bar.tasks:
            bar.start()
            bar.add_task(label, total=total)
        bar.advance(bar.tasks[0].id, count)

    try:
        yield advance
    finally:
        bar.stop()


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
