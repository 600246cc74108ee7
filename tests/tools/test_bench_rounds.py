"""Rounds of ``layerstream bench``: cold and warm passes, and contenders that fail."""

import select
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support.cgroup import memory_cgroup
from support.contenders import READY, make_setup, run_contenders, scripted_contender
from support.server import wait_until

from layerstream.tools.compare import processes
from layerstream.tools.compare.machine import this_machine

MIB = 1 << 20
ANSWERS_ALL = READY + "for line in sys.stdin: answer(seconds=2.0, shape=None)"


def test_a_cold_pass_reads_even_files_that_were_mapped_and_a_warm_pass_reads_nothing(
    tmp_path: Path,
) -> None:
    if this_machine(tmp_path)["filesystem"] == "tmpfs":
        pytest.skip("nothing is read from a disk on tmpfs")
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * (16 * MIB))
    code = f"""
import mmap
with open({str(weights)!r}, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[::4096])
{READY}
for line in sys.stdin:
    sum(mapped[::4096])
    answer(seconds=1.0, shape=None)
"""
    maps = scripted_contender(tmp_path, "maps", code)
    (turn,) = run_contenders(make_setup(tmp_path), maps).turns[maps]
    assert turn.cold
    assert turn.warm
    if not turn.all_was_dropped:
        pytest.skip("only root may drop what another process has mapped")
    assert (turn.cold.read_bytes or 0) >= 16 * MIB
    assert turn.warm.read_bytes == 0


IMPORTS = "import os, signal, sys\n"
FAILING = {
    "before it listens": (f"{IMPORTS}sys.exit('no such module')", "exit code 1: no such module"),
    "an exit code": (
        f"{READY}\nsys.stdin.readline(); print('what went wrong', file=sys.stderr); sys.exit(3)",
        "exit code 3: what went wrong",
    ),
    "a signal": (
        f"{READY}\nsys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)",
        "signal 9",
    ),
    "two lines at once": (
        f"{READY}\nsys.stdin.readline(); os.write(1, b'{{}}\\n{{}}\\n')",
        r"answered '{}\n{}\n', which is not one JSON object",
    ),
    "words": (
        f"{READY}\nsys.stdin.readline(); print('Loading ...')",
        r"answered 'Loading ...\n', which is not one JSON object",
    ),
    "no object": (
        f"{READY}\nsys.stdin.readline(); print(2.0)",
        r"answered '2.0\n', which is not one JSON object",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_contender_that_fails_is_reported_with_its_last_line_and_the_others_continue(
    case: str, tmp_path: Path
) -> None:
    code, message = FAILING[case]
    bad = scripted_contender(tmp_path, "bad", code)
    good = scripted_contender(tmp_path, "good", ANSWERS_ALL)
    outcome = run_contenders(make_setup(tmp_path), bad, good, rounds=2)
    assert [(each.name, each.why) for each in outcome.failed] == [("bad", f"round 1: {message}")]
    assert [turn.warm.seconds for turn in outcome.turns[good] if turn.warm] == [2.0, 2.0]
    assert outcome.turns[bad] == []


def time_out_when(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers time out once the file ``done`` exists and all output before it has been read."""

    def fake_select(reading: Any, *_: Any) -> Any:
        while True:
            exists = done.exists()
            found = select.select(reading, [], [], 0 if exists else 0.02)
            if exists or found[0]:
                return found

    monkeypatch.setattr(processes, "select", SimpleNamespace(select=fake_select))


def test_a_contender_that_never_answers_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = f"""{READY}
if not (child := os.fork()):
    signal.pause()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(tmp_path / "written")!r}, "w").write(str(child))
os.rename({str(tmp_path / "written")!r}, {str(tmp_path / "child")!r})
signal.pause()
"""
    time_out_when(tmp_path / "child", monkeypatch)
    outcome = run_contenders(make_setup(tmp_path), scripted_contender(tmp_path, "hangs", hangs))
    assert outcome.failed[0].why == "round 1: not done within 60 s"
    child = int((tmp_path / "child").read_text())

    def gone() -> bool:
        try:
            return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(gone)


def test_a_contender_that_sends_half_an_answer_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = f"""{READY}
sys.stdin.readline()
os.write(1, b'{{"seconds": ')
open({str(tmp_path / "half")!r}, "w").close()
signal.pause()
"""
    time_out_when(tmp_path / "half", monkeypatch)
    outcome = run_contenders(make_setup(tmp_path), scripted_contender(tmp_path, "halves", halves))
    assert outcome.failed[0].why == "round 1: not done within 60 s"


def test_a_contender_above_the_memory_limit_is_reported_as_killed_by_it(tmp_path: Path) -> None:
    with memory_cgroup():
        pass
    greedy = scripted_contender(
        tmp_path, "greedy", f"{READY}\nsys.stdin.readline()\nx = b'1' * {256 * MIB}"
    )
    outcome = run_contenders(replace(make_setup(tmp_path), limit_bytes=64 * MIB), greedy)
    assert outcome.failed[0].why == "round 1: killed at the limit of 64 MiB"
