"""A signal between any two lines of what starts a contender: its process, thread, files and cgroup end all the same."""

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
from support.cgroup import memory_cgroup

from layerstream.tools.compare import cgroups
from layerstream.tools.compare.processes import contender_process
from layerstream.tools.console.signals import (
    Interrupted,
    end_on_signals,
    entered_whole,
    undoing_on_signals,
)

TRIES = 60


@pytest.fixture
def signals_end_this_process() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    end_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class SignalAtLine:
    """Traces the lines that run, and sends a signal before one of them; not in ``__del__``, whose errors Python ignores."""

    def __init__(self, number: int) -> None:
        self.lines_left = number

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> "SignalAtLine | None":
        if frame.f_code.co_name == "__del__":
            return None
        if event == "line":
            self.lines_left -= 1
            if self.lines_left == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGTERM)
        return self


def start_and_end(folder: Path, group: cgroups.MemoryCgroup | None) -> None:
    started = contender_process(
        python=sys.executable, folder=folder, group=group, limit_bytes=None, timeout_seconds=60
    )
    with entered_whole(started):
        pass


def lines_of(folder: Path) -> int:
    tracing = SignalAtLine(0)
    sys.settrace(tracing)
    start_and_end(folder, None)
    sys.settrace(None)
    return -tracing.lines_left


@pytest.mark.usefixtures("signals_end_this_process")
def test_a_signal_between_any_two_lines_leaves_nothing_of_a_contender(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    threads, children = threading.active_count(), psutil.Process().children()
    rng = random.Random(0)
    interrupted = 0
    for line in sorted(rng.sample(range(1, lines), TRIES)):
        try:
            with undoing_on_signals():
                sys.settrace(SignalAtLine(line))
                start_and_end(tmp_path, None)
        except Interrupted as error:
            interrupted += error.exit_code == 128 + signal.SIGTERM
        finally:
            sys.settrace(None)
        assert threading.active_count() == threads
        assert psutil.Process().children() == children
        assert list(tmp_path.iterdir()) == []
    assert interrupted > TRIES // 2


@pytest.mark.usefixtures("signals_end_this_process")
def test_a_signal_between_any_two_lines_leaves_no_cgroup() -> None:
    with memory_cgroup():  # skips the test where none can be made
        pass
    interrupted = 0
    for line in range(1, 60):
        made: list[Path] = []
        try:
            with undoing_on_signals(), ExitStack() as stack:
                sys.settrace(SignalAtLine(line))
                group = stack.enter_context(entered_whole(cgroups.memory_cgroup(64 << 20)))
                made.append(group.folder)
        except Interrupted:
            interrupted += 1
        finally:
            sys.settrace(None)
        folders = {cgroups._V1, cgroups._V2}
        assert not any(list(each.glob(f"layerstream-{os.getpid()}-*")) for each in folders)
    assert interrupted
