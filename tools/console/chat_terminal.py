"""What a chat reads from and shows in a terminal. Without one, it reads lines, and shows only answers."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["ChatTerminal"]

_PROMPT = ">>> "
_MORE = "... "
_FENCE = '"""'
_ERASE = "\r\x1b[2K"


class ChatTerminal:
    """The terminal, or the standard streams.

    Attributes:
        interactive: Whether somebody types.
    """

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._waiting = False  # whether the line of ``wait`` is shown
        self._on_interrupt: Callable[[], object] | None = None
        for stream in (sys.stdin, sys.stdout):
            # Bytes that are no text in this encoding are shown as such, instead of ending the chat.
            if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
                reconfigure(errors="replace")
        if self.interactive:
            with suppress(ImportError):
                import readline  # noqa: F401 - input() edits lines with it

    def read(self) -> str | None:
        '''Read a message; None at the end of the input.

        It is a line. One that begins with """ goes on to a line that ends with it, and one that ends with a backslash goes on in
        the next.

        Raises:
            KeyboardInterrupt: The user has pressed Ctrl-C.
        '''
        line = self._line(_PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(_FENCE):
            return self._fenced(line.lstrip().removeprefix(_FENCE))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            if (more := self._line(_MORE)) is None:
                break
            lines.append(more)
        return "\n".join(lines)

    def _fenced(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(_FENCE):
            lines.append(line)
            if (more := self._line(_MORE)) is None:
                return "\n".join(lines)
            line = more
        return "\n".join([*lines, line.rstrip().removesuffix(_FENCE)])

    def _line(self, prompt: str) -> str | None:
        if self.interactive:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    def write(self, text: str) -> None:
        """Write a piece of an answer."""
        if text:
            self.waited()
            print(text, end="", flush=True)

    def note(self, text: str) -> None:
        """Say something beside the conversation."""
        self.waited()
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)

    def wait(self, what: str) -> None:
        """Show what is waited for, until something else is written."""
        if self.interactive and sys.stderr.isatty():
            self._waiting = True
            # What wraps could not be erased. The last column would wrap in some terminals.
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"{_ERASE}{f'({what})'[: columns - 1]}", end="", file=sys.stderr, flush=True)

    def waited(self) -> None:
        """Take away what ``wait`` has shown."""
        if self._waiting:
            self._waiting = False
            print(_ERASE, end="", file=sys.stderr, flush=True)

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """While the block runs, Ctrl-C calls what ``on_interrupt`` says, or else raises KeyboardInterrupt.

        Without a terminal, or in somebody else's process, it stays what it was.
        """
        before = signal.getsignal(signal.SIGINT)
        if not self.interactive or before is signal.SIG_IGN:
            yield
            return

        def interrupt(_number: int, _frame: FrameType | None) -> None:
            if self._on_interrupt is None:
                raise KeyboardInterrupt
            self._on_interrupt()

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def on_interrupt(self, call: Callable[[], object]) -> Iterator[None]:
        """While the block runs, Ctrl-C calls ``call``; nothing in the block is interrupted."""
        self._on_interrupt = call
        try:
            yield
        finally:
            self._on_interrupt = None
