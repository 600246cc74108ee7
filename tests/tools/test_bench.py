"""``layerstream bench``: the whole command, its report, and wrong usage."""

import importlib.util
import json
import os
import re
from pathlib import Path

import psutil
import pytest
from support.cgroup import memory_cgroup
from support.contenders import AIRLLM, interpreter_with, save_llama_server
from support.models import save_model

from layerstream.tools.cli import main
from layerstream.tools.compare import cgroups

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300}
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, in a folder with nothing else."""
    return save_model(tmp_path_factory.mktemp("bench") / "model", "llama", **SMALL)


def our_cgroups() -> list[Path]:
    """The cgroups of this process: other processes may be measuring at the same time."""
    names = f"layerstream-{os.getpid()}-*"
    return [each for root in (cgroups._V1, cgroups._V2) for each in root.glob(names)]


def test_all_contenders_are_measured_in_one_run_and_nothing_is_left_over(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children = psutil.Process().children()  # such as the service of other tests
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    air = interpreter_with(tmp_path / "air", airllm=AIRLLM)
    server = save_llama_server(tmp_path / "bin")
    options = ["--against", "airllm,llama.cpp", "--rounds", "1", "--prompt-tokens", "5"]
    options += ["--python", f"airllm={air}", "--llama-cpp", str(server.parent)]
    options += ["--gguf", str(tmp_path / "weights.gguf"), "--json"]
    assert main(["bench", str(model), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["contenders"]}
    expected = ["layerstream", "raw read", "transformers, all in memory"]
    assert list(rows) == [*expected, "AirLLM", "llama.cpp"]
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
    assert psutil.Process().children() == children


def test_the_planner_finds_a_memory_limit_and_the_report_names_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with memory_cgroup():  # skips the test where none can be made
        pass
    picture = tmp_path / "bars.svg"
    plot = [] if importlib.util.find_spec("matplotlib") is None else ["--plot", str(picture)]
    options = ["--against", "airllm", "--rounds", "1", "--memory-limit", "700MiB", *plot]
    assert main(["bench", str(model), *options]) == 0
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
    assert bool(plot) == picture.exists()


def test_a_memory_limit_is_refused_in_one_line_where_no_cgroup_can_be_made(
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


BAD = {
    "no config": ({}, "config.json"),
    "no weights for llama.cpp": ({"--gguf": "nowhere.gguf"}, "nowhere.gguf"),
    "a picture in a missing folder": ({"--plot": "no/such/folder/a.png"}, "no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_1(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = BAD[case]
    source = model if options else tmp_path
    given = [part for pair in options.items() for part in pair]
    assert main(["bench", str(source), "--against", "airllm", *given]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    "options",
    [["--against", "nobody"], ["--python", "nobody=x"], ["--rounds", "0"], ["--prompt-ids", "a"]],
)
def test_wrong_usage_is_exit_code_2(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "x", *options])
