"""SIGINT and SIGTERM at any moment of a command: it ends soon, silently, with a shell's exit code, and leaves nothing."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from support.models import save_model
from support.selection import covering

from layerstream.tools.compare import cgroups

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
MOMENTS = range(6)
# Two, on a machine with nothing else to do.
MOST_SECONDS = 8
COMMANDS = {
    "plan": ("--fresh",),
    "generate": ("--prompt-ids", "3,4", "--max-new-tokens", "2000", "--host", "400MiB"),
    "profile": ("--sweeps", "100000"),
}
SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 300}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    settings = {**SIZES, "max_position_embeddings": 4096}
    return save_model(tmp_path_factory.mktemp("signals") / "model", "llama", **settings)


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, from the moment on that it handles signals."""
    program = "from layerstream.tools.cli import main; raise SystemExit(main())"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not handles_signals(process):
                os.sched_yield()
            yield process
        finally:
            process.kill()


def handles_signals(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@covering(command=list(COMMANDS), moment=MOMENTS)
def test_a_signal_at_any_moment_ends_a_command_silently(
    command: str, moment: int, model: Path
) -> None:
    rng = random.Random(f"{command} {moment}")
    number = rng.choice(list(CODES))
    with running(command, model, *COMMANDS[command]) as process:
        # The first moments are imports, the last ones streaming.
        threading.Event().wait(rng.uniform(moment, moment + 1) * 0.8)
        began = time.monotonic()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        seconds = time.monotonic() - began
    # 0: it had ended before. In the interpreter's last moments, the signal itself ends it; to a shell that is the same.
    assert process.returncode in {CODES[number], -number, 0}, error
    assert error == "" or process.returncode == 0
    assert seconds < MOST_SECONDS


def contenders_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if "layerstream.tools.compare.worker" in child.cmdline():
                found.append(child)
    return found


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_contenders_run_leaves_no_process_no_folder_and_no_cgroup(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    work = tmp_path / "work"
    options = ("--against", "accelerate", "--rounds", "50", "--work", work)
    with running("bench", model, *options) as process:
        while not (children := contenders_of(process)):
            os.sched_yield()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (CODES[number], "")
    assert list(work.iterdir()) == []
    assert not any(each.is_running() for each in children)
    roots = (cgroups._V1, cgroups._V2)
    assert [each for root in roots for each in root.glob(f"layerstream-{process.pid}-*")] == []


def test_signals_that_the_caller_ignores_stay_ignored(model: Path) -> None:
    program = "from layerstream.tools.cli import main; raise SystemExit(main())"
    line = 'trap "" INT TERM; "$@" & sleep 0.3; kill -TERM $!; kill -INT $!; wait $!'
    command = ["bash", "-c", line, "x", sys.executable, "-c", program, "plan", str(model)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stderr) == (0, "")
