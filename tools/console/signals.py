"""What SIGINT and SIGTERM do to the command: it ends at once, and silently, with a shell's exit code for the signal.

Little is imported here: signals are handled before the rest of the command is imported, which takes a second or two.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

__all__ = [
    "INTERRUPTED",
    "Interrupted",
    "end_on_signals",
    "entered_whole",
    "signals_held",
    "undoing_on_signals",
]

_T = TypeVar("_T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SIGNALLED = 128  # a shell's exit code for a process that a signal ended, less the signal's number
INTERRUPTED = _SIGNALLED + signal.SIGINT


@dataclass(slots=True)
class _Held:
    """How many blocks hold signals back, and the signals that came meanwhile."""

    blocks: int = 0
    signals: list[int] = field(default_factory=list)


_held = _Held()


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
    if _held.blocks:
        _held.signals.append(number)
        return
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os._exit(_SIGNALLED + number)


@contextmanager
def undoing_on_signals() -> Iterator[None]:
    """Within the block, the first signal raises ``Interrupted``, so that the block can undo what it did. The second ends it.

    This does nothing where signals do not end the process: in somebody else's.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if _held.blocks:
            _held.signals.append(number)
            return
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
    """Hold back signals while the block runs.

    They are held by our handlers, not by the thread's mask: the system would give them to another thread then, and Python
    runs the handlers in the main thread all the same. A process that is started meanwhile takes them as ever.
    """
    _held.blocks += 1
    try:
        yield
    finally:
        _held.blocks -= 1
        if not _held.blocks and _held.signals:
            first, *_held.signals = _held.signals
            signal.raise_signal(first)


@contextmanager
def entered_whole(manager: AbstractContextManager[_T]) -> Iterator[_T]:
    """``manager``, entered and left with signals held back.

    One that comes while a folder, process or thread is made would raise before anybody is responsible for ending it.
    """
    with ExitStack() as stack:
        with signals_held():
            value = stack.enter_context(manager)
        yield value
        with signals_held():
            stack.close()
