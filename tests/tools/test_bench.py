"""``layerstream bench``: who takes part, what is found, and that nothing of it is left over."""

import argparse
import importlib.util
import json
import os
import re
import select
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from support.cgroup import memory_cgroup
from support.contenders import AIRLLM, interpreter_with, llama_server, program
from support.models import save_model
from support.server import until

from layerstream.tools.cli import main
from layerstream.tools.compare import cgroups, contenders, processes
from layerstream.tools.compare.contenders import Contender, line_up
from layerstream.tools.compare.machine import this_machine
from layerstream.tools.compare.results import Spread, rows_of
from layerstream.tools.compare.rounds import Course, Outcome, Pass, Turn, alternate

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300}
MIB = 1 << 20

# Says it is ready, then does what a test wants of it; reads and answers line by line, as the worker does.
READY = """
import json, os, signal, sys
def answer(**content):
    print(json.dumps(content), flush=True)
asked = json.loads(sys.stdin.readline())
answer(open_seconds=1.0, children=[], notes={}, versions={})
"""
GOES_ON = READY + "for line in sys.stdin: answer(seconds=2.0, shape=None)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, in a folder with nothing else."""
    return save_model(tmp_path_factory.mktemp("bench") / "model", "llama", **SMALL)


@pytest.fixture
def course(tmp_path: Path) -> Course:
    """For contenders that read nothing."""
    (tmp_path / "work").mkdir()
    return Course(
        model=tmp_path,
        prompt_ids=(1, 2),
        work=tmp_path / "work",
        gguf=None,
        limit_bytes=None,
        cold=True,
        warm=True,
        timeout_seconds=60,
    )


def contender(tmp_path: Path, name: str, code: str) -> Contender:
    """One whose interpreter runs ``code``, whatever it is asked to run."""
    return Contender(name=name, opener=name, python=str(program(tmp_path / name, code)))


def raced(course: Course, *those: Contender, rounds: int = 1) -> Outcome:
    return alternate(those, course, rounds=rounds, advance=lambda _: None)


def our_cgroups() -> list[Path]:
    """Those of this process: others may be measuring beside it."""
    names = f"layerstream-{os.getpid()}-*"
    return [each for root in (cgroups._V1, cgroups._V2) for each in root.glob(names)]


# -- the whole command -----------------------------------------------------------------------------


def test_all_are_measured_side_by_side_and_nothing_is_left_over(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    air = interpreter_with(tmp_path / "air", airllm=AIRLLM)
    server = llama_server(tmp_path / "bin")
    asked = ["--against", "airllm,llama.cpp", "--rounds", "1", "--prompt-tokens", "5"]
    asked += ["--python", f"airllm={air}", "--llama-cpp", str(server.parent)]
    asked += ["--gguf", str(tmp_path / "weights.gguf"), "--json"]
    assert main(["bench", str(model), *asked]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["contenders"]}
    floors = ["layerstream", "raw read", "transformers, all in memory"]
    assert list(rows) == [*floors, "AirLLM", "llama.cpp"]
    assert (report["failed"], report["left_out"], report["prompt_tokens"]) == ([], [], 5)
    for name in ("layerstream", "AirLLM"):
        assert rows[name]["logits"]["equal"]
        assert rows[name]["logits"]["compared_with"] == "transformers, all in memory"
        assert len(rows[name]["cold_seconds"]) == len(rows[name]["warm_seconds"]) == 1
        assert rows[name]["peak_anonymous_bytes"] > 10 * MIB
    assert rows["layerstream"]["warm_ratio_to_layerstream"]["median"] == 1
    assert rows["llama.cpp"]["warm_seconds"] == [1.5]
    assert rows["llama.cpp"]["logits"] is None
    assert (
        rows["raw read"]["warm_seconds"]
        == rows["transformers, all in memory"]["cold_seconds"]
        == []
    )
    assert {"processor", "cores", "memory_bytes"} <= report["machine"].keys()
    assert [each.name for each in model.parent.iterdir()] == ["model"]  # the work folder is gone
    assert our_cgroups() == []
    assert psutil.Process().children() == []


def test_within_a_limit_the_planner_finds_it_and_the_report_is_for_people(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with memory_cgroup():  # or there is nothing to test here
        pass
    drawn = tmp_path / "bars.svg"
    plot = [] if importlib.util.find_spec("matplotlib") is None else ["--plot", str(drawn)]
    asked = ["--against", "airllm", "--rounds", "1", "--memory-limit", "700MiB", *plot]
    assert main(["bench", str(model), *asked]) == 0
    text = capsys.readouterr().out
    for words in (
        "each in 700 MiB",
        "transformers, mapped",
        "transformers, all in memory",
        "warm / ours",
        "equal",
        "Left out: airllm: not installed",
        "Machine: ",
        "torch",
    ):
        assert words in text
    budget = re.search(r"host RAM .*? of ([0-9.]+) MiB:", text)
    assert budget is not None
    assert float(budget[1]) < 700
    assert bool(plot) == drawn.exists()


def test_a_cold_pass_reads_even_what_was_mapped_before_and_a_warm_one_reads_nothing(
    course: Course, tmp_path: Path
) -> None:
    if this_machine(tmp_path)["filesystem"] == "tmpfs":
        pytest.skip("nothing is read from a disk on tmpfs")
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * (16 * MIB))
    maps = f"""
import mmap
with open({str(weights)!r}, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[::4096])
{READY}
for line in sys.stdin:
    sum(mapped[::4096])
    answer(seconds=1.0, shape=None)
"""
    maps = contender(tmp_path, "maps", maps)
    (turn,) = raced(course, maps).turns[maps]
    assert turn.cold
    assert turn.warm
    if not turn.all_was_dropped:
        pytest.skip("only root may drop what another process has mapped")
    assert (turn.cold.read_bytes or 0) >= 16 * MIB
    assert turn.warm.read_bytes == 0


# -- those who fail --------------------------------------------------------------------------------

DIES = "import os, signal, sys\n"
FAILING = {
    "before it listens": (f"{DIES}sys.exit('no such module')", "exit code 1: no such module"),
    "an error": (
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
def test_one_that_fails_is_reported_with_its_last_words_and_the_others_go_on(
    case: str, course: Course, tmp_path: Path
) -> None:
    code, says = FAILING[case]
    bad = contender(tmp_path, "bad", code)
    good = contender(tmp_path, "good", GOES_ON)
    outcome = raced(course, bad, good, rounds=2)
    assert [(each.name, each.why) for each in outcome.failed] == [("bad", f"round 1: {says}")]
    assert [turn.warm.seconds for turn in outcome.turns[good] if turn.warm] == [2.0, 2.0]
    assert outcome.turns[bad] == []


def time_is_up_when(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no answer be waited for any more when ``done`` is there, and what came before it has been read."""

    def look(reading: Any, *_: Any) -> Any:
        while True:
            there = done.exists()
            found = select.select(reading, [], [], 0 if there else 0.02)
            if there or found[0]:
                return found

    monkeypatch.setattr(processes, "select", SimpleNamespace(select=look))


def test_one_that_never_answers_is_ended_with_all_that_it_started(
    course: Course, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = f"""{READY}
if not (child := os.fork()):
    signal.pause()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(tmp_path / "written")!r}, "w").write(str(child))
os.rename({str(tmp_path / "written")!r}, {str(tmp_path / "child")!r})
signal.pause()
"""
    time_is_up_when(tmp_path / "child", monkeypatch)
    outcome = raced(course, contender(tmp_path, "hangs", hangs))
    assert outcome.failed[0].why == "round 1: not done within 60 s"
    child = int((tmp_path / "child").read_text())

    def gone() -> bool:
        try:
            return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    until(gone)


def test_one_that_answers_by_halves_is_ended_too(
    course: Course, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = f"""{READY}
sys.stdin.readline()
os.write(1, b'{{"seconds": ')
open({str(tmp_path / "half")!r}, "w").close()
signal.pause()
"""
    time_is_up_when(tmp_path / "half", monkeypatch)
    outcome = raced(course, contender(tmp_path, "halves", halves))
    assert outcome.failed[0].why == "round 1: not done within 60 s"


def test_one_that_takes_more_than_the_limit_is_said_to_be_killed_by_it(
    course: Course, tmp_path: Path
) -> None:
    with memory_cgroup():
        pass
    greedy = contender(tmp_path, "greedy", f"{READY}\nsys.stdin.readline()\nx = b'1' * {256 * MIB}")
    outcome = raced(replace(course, limit_bytes=64 * MIB), greedy)
    assert outcome.failed[0].why == "round 1: killed at the limit of 64 MiB"


def test_a_limit_where_no_cgroup_can_be_made_is_refused_in_one_line(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cgroups, "_V1", tmp_path / "none")
    monkeypatch.setattr(cgroups, "_V2", tmp_path)
    assert main(["bench", str(model), "--against", "airllm", "--memory-limit", "1GiB"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "no memory controller" in errors[0]
    assert list(tmp_path.iterdir()) == []


# -- who takes part --------------------------------------------------------------------------------


def asked(**options: object) -> argparse.Namespace:
    nothing = {"python": [], "llama_cpp": None, "gguf": None, "memory_limit": None}
    return argparse.Namespace(**nothing | {"cold": False, "warm": False, "against": []} | options)


def test_what_is_not_installed_or_does_not_fit_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bare = str(program(tmp_path / "bare", "print([False, False])".replace("F", "f")))
    python = [("accelerate", bare), ("airllm", bare)]
    everyone = asked(against=list(contenders.PEER_NAMES), python=python)
    found = line_up(everyone, files=[], model_bytes=2 << 30, free_bytes=1 << 30)
    assert [each.name for each in found.contenders] == ["layerstream", "raw read"]
    why = {each.name: each.why for each in found.left_out}
    assert "3 GiB are needed, 1 GiB are free" in why["transformers, all in memory"]
    assert f"{bare} -m pip install accelerate" in why["accelerate"]
    assert f"{bare} -m pip install airllm" in why["airllm"]
    assert "--llama-cpp FOLDER" in why["llama.cpp"]
    llama_server(tmp_path / "bin")
    found = line_up(
        asked(against=["llama.cpp"], llama_cpp=tmp_path / "bin", warm=True),
        files=[],
        model_bytes=1,
        free_bytes=8 << 30,
    )
    why = {each.name: each.why for each in found.left_out}
    assert "--gguf FILE" in why["llama.cpp"]
    assert "past the page cache" in why["raw read"]


def test_within_a_limit_accelerate_also_runs_with_its_memory_filled(tmp_path: Path) -> None:
    has = str(program(tmp_path / "has", "print('[true, true]')"))
    found = line_up(
        asked(against=["accelerate"], python=[("accelerate", has)], memory_limit=2 << 30),
        files=[],
        model_bytes=1 << 30,
        free_bytes=8 << 30,
    )
    limited = {each.name: each.limited for each in found.contenders}
    assert limited["accelerate, all on disk"]
    assert limited["accelerate, memory filled"]
    assert limited["transformers, mapped"]
    assert not limited["transformers, all in memory"]


# -- figures ---------------------------------------------------------------------------------------


def turn(number: int, *, cold: float | None = None, shape: tuple[int, ...] | None = None) -> Turn:
    return Turn(
        round=number,
        all_was_dropped=True,
        open_seconds=1.0,
        cold=None if cold is None else Pass(seconds=cold, read_bytes=10),
        warm=None,
        peak_anonymous_bytes=1,
        peak_bytes=None,
        logits_shape=shape,
        notes={},
        versions={},
    )


def test_ratios_are_taken_round_by_round(course: Course) -> None:
    ours = Contender(name="layerstream", opener="layerstream")
    other = Contender(name="other", opener="other")
    mine = [turn(1, cold=1.0), turn(2, cold=2.0), turn(3, cold=4.0)]
    theirs = [turn(1, cold=3.0), turn(3, cold=4.0)]
    row = rows_of(Outcome(turns={ours: mine, other: theirs}, failed=()), course)[1]
    assert row.ratio("cold") == Spread(median=2.0, least=1.0, most=3.0)
    assert row.ratio("warm") is None
    assert row.seconds("cold") == Spread(median=3.5, least=3.0, most=4.0)
    assert row.to_json()["cold_read_bytes"] == [10, 10]


def test_logits_that_differ_are_measured_and_those_of_another_shape_are_not_comparable(
    course: Course,
) -> None:
    logits = {
        "layerstream": [[1.0, 2.0], [3.0, 4.0]],
        "transformers, all in memory": [[1.0, 2.0], [4.5, 4.0]],
        "AirLLM": [[1.0]],
    }
    turns = {}
    for name, values in logits.items():
        each = Contender(name=name, opener=name)
        array = np.array(values, np.float32)
        array.tofile(course.logits_file(each))
        turns[each] = [turn(1, shape=array.shape)]
    ours, reference, air = rows_of(Outcome(turns=turns, failed=()), course)
    assert reference.agreement is None
    assert ours.agreement
    assert not ours.agreement.equal
    assert (ours.agreement.max_abs_difference, ours.agreement.same_argmax_share) == (1.5, 0.5)
    assert air.agreement
    assert air.agreement.text() == "not comparable"


# -- wrong usage -----------------------------------------------------------------------------------

BAD = {
    "no config": ({}, "config.json"),
    "no weights for llama.cpp": ({"--gguf": "nowhere.gguf"}, "nowhere.gguf"),
    "a picture in a missing folder": ({"--plot": "no/such/folder/a.png"}, "no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_1(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = BAD[case]
    source = model if options else tmp_path
    given = [part for pair in options.items() for part in pair]
    assert main(["bench", str(source), "--against", "airllm", *given]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert says in errors[0]


@pytest.mark.parametrize(
    "options",
    [["--against", "nobody"], ["--python", "nobody=x"], ["--rounds", "0"], ["--prompt-ids", "a"]],
)
def test_wrong_usage_is_exit_code_2(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "x", *options])
