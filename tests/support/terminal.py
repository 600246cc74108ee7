"""A command in a pseudo-terminal: what a user types and sees."""

import os
import pty
import re
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.forked import COMMAND, ForkedProcess

__all__ = ["Terminal", "in_terminal"]

_TIMEOUT_SECONDS = 60  # for operations of a second, on a busy machine
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """The user's side of the terminal."""

    def __init__(self, descriptor: int, process: ForkedProcess) -> None:
        self._descriptor = descriptor
        self._raw = b""
        self._seen = 0  # characters of ``text`` up to the latest match
        self.process = process

    @property
    def text(self) -> str:
        """All that was shown, without control sequences."""
        return _CONTROLS.sub("", self._raw.decode(errors="replace"))

    def resize(self, *, columns: int) -> None:
        """Give the terminal another width, as its window does."""
        _resize(self._descriptor, columns=columns)

    def type(self, text: str) -> None:
        r"""Type ``text``; "\x03" is Ctrl-C, "\x04" Ctrl-D."""
        os.write(self._descriptor, text.encode())

    def interrupt_prompt(self, pattern: str) -> re.Match[str]:
        """Press Ctrl-C at a prompt, as a user does: again if nothing happens, up to ten times.

        Python's readline waits for a key after a signal that comes between its prompt and its waiting.
        """
        for _ in range(9):
            self.type("\x03")
            try:
                return self.expect(pattern, timeout_seconds=_TIMEOUT_SECONDS / 10)
            except AssertionError:
                continue
        self.type("\x03")
        return self.expect(pattern)

    def expect(self, pattern: str, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> re.Match[str]:
        """Wait until what comes after the last match matches ``pattern``."""
        deadline = time.monotonic() + timeout_seconds
        while (found := re.compile(pattern).search(self.text, self._seen)) is None:
            assert self._read(deadline), f"no {pattern!r} in {self.text[self._seen :]!r}"
        self._seen = found.end()
        return found

    def end(self) -> int:
        """Wait until the command has ended; returns its exit code."""
        while self._read(time.monotonic() + _TIMEOUT_SECONDS):
            pass
        return self.process.wait(_TIMEOUT_SECONDS)

    def _read(self, deadline_seconds: float) -> bool:
        """Read what is shown next; returns False at the end, and if nothing comes in time."""
        left = max(0.0, deadline_seconds - time.monotonic())
        if not select.select([self._descriptor], [], [], left)[0]:
            return False
        try:
            more = os.read(self._descriptor, 65536)
        except OSError:  # how Linux says that the other side is closed
            return False
        self._raw += more
        return bool(more)


@contextmanager
def in_terminal(*arguments: str | Path, program: str | None = None) -> Iterator[Terminal]:
    """Run the ``layerstream`` command, or ``program`` with these arguments, in a terminal during the block."""
    ours, theirs = pty.openpty()
    _resize(ours, columns=200)
    try:
        process = ForkedProcess(
            program or COMMAND,
            arguments,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            environment={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm"},
            leads_terminal=True,
        )
    finally:
        os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _resize(descriptor: int, *, columns: int) -> None:
    import fcntl
    import struct
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
