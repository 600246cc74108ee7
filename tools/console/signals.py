"""What SIGINT and SIGTERM do to the command: it ends at once, and silently, with a shell's exit code for the signal.

Little is imported here: signals are handled before the rest of the command is imported, which takes a second or two.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["INTERRUPTED", "Interrupted", "end_on_signals", "signals_held", "undoing_on_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SIGNALLED = 128  # a shell's exit code for a process that a signal ended, less the signal's number
INTERRUPTED = _SIGNALLED + signal.SIGINT


class Interrupted(KeyboardInterrupt):
    """Raised by a signal within ``undoing_on_signals``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = _SIGNALLED + number


def end_on_signals() -> None:
    """From here on, end the process at a signal. Signals that the caller ignores (nohup) stay ignored.

    An exception raised by a handler would come out of an import, a callback or the interpreter's exit, some of which print
    it and go on. Nothing has to be undone: memory, files and devices are released by the system. A command that
    leaves something behind undoes it itself (``undoing_on_signals``), and a service shuts down by itself.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os._exit(_SIGNALLED + number)


@contextmanager
def undoing_on_signals() -> Iterator[None]:
    """Within the block, the first signal raises ``Interrupted``, so that the block can undo what it did. The second ends it.

    This does nothing where signals do not end the process: in somebody else's.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        end_on_signals()
        raise Interrupted(number)

    ours = [number for number in _SIGNALS if signal.getsignal(number) is _end]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _end)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back signals while the block runs, so that they do not interrupt what undoes something."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
