"""Processes that are forked from one that has imported torch and transformers, which takes a new interpreter seconds.

They differ from new ones in nothing but that, and in that no interpreter is taken down in the end. Tests of imports, of what
happens meanwhile and of that end start interpreters.
"""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import termios
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

__all__ = ["COMMAND", "ForkedProcess", "run_forked"]

COMMAND = "import sys; from layerstream.tools.cli import main; sys.exit(main())"

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "layerstream.tools.cli",
        "layerstream.pipeline.model",
        "layerstream.tools.serving.server",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "torch._dynamo",
        "torch._refs",
        "torch.fx.experimental.symbolic_shapes",
    ]
)


class ForkedProcess:
    """Runs a Python ``program`` as ``python -W error -c`` does, with these descriptors as its standard streams."""

    def __init__(
        self,
        program: str,
        arguments: Sequence[str | Path],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        environment: Mapping[str, str] = os.environ,
        leads_terminal: bool = False,
    ) -> None:
        streams = [Connection(os.dup(each)) for each in (stdin, stdout, stderr)]
        given = (program, list(map(str, arguments)), streams, dict(environment), leads_terminal)
        self._process = _SERVER.Process(target=_run, args=given)
        self._process.start()
        for each in streams:
            each.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; returns its exit code."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """End it as a service manager does."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, with what it has started."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not begun, and has no group yet
                os.kill(self.pid, signal.SIGKILL)


def run_forked(
    *arguments: str | Path,
    program: str = COMMAND,
    text: str | bytes = "",
    environment: Mapping[str, str] = os.environ,
    seconds: float = 100,
) -> subprocess.CompletedProcess[str]:
    """Run the ``layerstream`` command, or ``program`` with these arguments, with ``text`` as its standard input."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
    ):
        given.write(text.encode() if isinstance(text, str) else text)
        given.seek(0)
        process = ForkedProcess(
            program,
            arguments,
            stdin=given.fileno(),
            stdout=output.fileno(),
            stderr=errors.fileno(),
            environment=environment,
        )
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, code, _content(output), _content(errors))


def _content(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def _run(
    program: str,
    arguments: list[str],
    streams: list[Connection],
    environment: dict[str, str],
    leads_terminal: bool,
) -> None:
    os.setsid()
    if leads_terminal:
        fcntl.ioctl(streams[0].fileno(), termios.TIOCSCTTY, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering)
        for number, mode, buffering in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["-c", *arguments]
    warnings.resetwarnings()
    warnings.simplefilter("error")
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
