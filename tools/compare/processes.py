"""A contender's process: starts it, exchanges messages with it, measures its memory, and ends it."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from layerstream import tools
from layerstream.stages.text import format_bytes
from layerstream.tools.compare.cgroups import MemoryCgroup

__all__ = ["ContenderError", "ContenderProcess", "contender_process"]

_POLL_SECONDS = 0.02
_CLOSE_SECONDS = 10.0
_QUOTED_BYTES = 100
_WORKER = "layerstream.tools.compare.worker"


class ContenderError(Exception):
    """Raised when a contender fails, is killed, or takes too long; says which and how."""


class ContenderProcess:
    """The process of a contender, which answers each line with one.

    Attributes:
        pids: Process ids of the contender and its children.
        peak_anonymous_bytes: Peak of their anonymous memory, as sampled.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        stderr: Path,
        group: MemoryCgroup | None,
        limit_bytes: int | None,
        timeout_seconds: float,
    ) -> None:
        self._process = process
        self._stderr = stderr
        self._group = group
        self._limit_bytes = limit_bytes
        self._timeout_seconds = timeout_seconds
        self.pids = [process.pid]
        self.peak_anonymous_bytes = 0

    def request(self, **message: Any) -> dict[str, Any]:
        """Send ``message`` and wait for the answer.

        Raises:
            ContenderError: The contender fails, takes too long, or answers anything but JSON.
        """
        assert self._process.stdin is not None  # noqa: S101 - it was started with pipes
        assert self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._failure() from error
        deadline = time.monotonic() + self._timeout_seconds
        line = b""
        while not line.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise ContenderError(f"not done within {self._timeout_seconds:g} s")
            # The pipe is unbuffered: this returns what is available.
            piece = self._process.stdout.read(1 << 16)
            if not piece:
                raise self._failure()
            line += piece
        answer = _decoded(line)
        self.pids += answer.get("children", [])
        return answer

    def read_bytes(self) -> int | None:
        """Bytes read from disk so far, as the kernel counts them; None if it does not."""
        try:
            texts = [Path(f"/proc/{pid}/io").read_text() for pid in self.pids]
        except OSError:
            return None
        lines = [line for text in texts for line in text.splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))

    def watch(self, ended: threading.Event) -> None:
        """Sample the memory until ``ended`` is set."""
        while not ended.wait(_POLL_SECONDS):
            now = sum(map(_anonymous_bytes, list(self.pids)))
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, now)

    def close(self) -> None:
        """Give the process some time to exit by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)

    def _failure(self) -> ContenderError:
        try:
            code = self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return ContenderError("it answers no more")
        if self._limit_bytes is not None and self._group is not None and self._group.kills():
            return ContenderError(f"killed at the limit of {format_bytes(self._limit_bytes)}")
        ending = f"signal {-code}" if code < 0 else f"exit code {code}"
        lines = self._stderr.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ContenderError(f"{ending}: {last}" if last else ending)


def _decoded(line: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        answer = json.loads(line)
        if isinstance(answer, dict):
            return answer
    quoted = line[:_QUOTED_BYTES].decode(errors="replace")
    raise ContenderError(f"answered {quoted!r}, which is not one JSON object")


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")
    )


@contextmanager
def contender_process(
    *,
    python: str,
    folder: Path,
    group: MemoryCgroup | None,
    limit_bytes: int | None,
    timeout_seconds: float,
) -> Iterator[ContenderProcess]:
    """Start a worker, whose first message names the contender; afterwards kill it and all its children.

    To be entered with signals held back (``entered_whole``).

    Args:
        python: Path of the interpreter.
        folder: Working directory, and where its stderr is kept.
        group: The cgroup to start it in.
        limit_bytes: The limit of the cgroup, for the error if the process is killed.
        timeout_seconds: Time limit for an answer.
    """
    command = [python, "-m", _WORKER]
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix="stderr-") as stderr,
        subprocess.Popen(  # noqa: S603 - an interpreter that the user named
            group.inside(command) if group else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,  # so that no data is left to be flushed to a dead process
            cwd=folder,
            env=_environment(python, folder),
            start_new_session=True,  # so that all its processes can be killed together
        ) as process,
    ):
        ended = threading.Event()
        contender = ContenderProcess(
            process,
            stderr=Path(stderr.name),
            group=group,
            limit_bytes=limit_bytes,
            timeout_seconds=timeout_seconds,
        )
        watcher = threading.Thread(target=contender.watch, args=(ended,), name="layerstream-bench")
        watcher.start()
        try:
            yield contender
        finally:
            ended.set()
            watcher.join()
            for pid in group.processes() if group else []:
                _kill(os.kill, pid)
            _kill(os.killpg, process.pid)


def _kill(send: Callable[[int, int], None], pid: int) -> None:
    with suppress(ProcessLookupError):
        send(pid, signal.SIGKILL)


def _environment(python: str, folder: Path) -> dict[str, str]:
    """The environment of ``python``: another interpreter than ours can import these tools, but none of our packages."""
    if python == sys.executable:
        return dict(os.environ)
    namespace = folder / "import" / "layerstream"
    if not namespace.is_dir():
        namespace.mkdir(parents=True)
        (namespace / "tools").symlink_to(Path(tools.__path__[0]).resolve())
    path = {"PYTHONPATH": str(namespace.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")} | path
