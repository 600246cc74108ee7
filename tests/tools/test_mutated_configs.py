"""Models whose folder holds something else than it should: the command refuses it in one line, or runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import save_model as save_case

from layerstream.pipeline import Checkpoint
from layerstream.stages.errors import CheckpointError
from layerstream.tools.benchmarks.fuzz_configs import (
    ARGUMENTS,
    MODELS,
    failure_of,
    mutated,
    save_model,
)

SEEDS = range(16)
PROGRAM = "import sys; from layerstream.tools.cli import main; sys.exit(main())"


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """The folder of a tiny model, and its config.json."""
    folder = save_model(tmp_path_factory.mktemp("mutated") / request.param, request.param)
    return folder, json.loads((folder / "config.json").read_bytes())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_mutated_configs_end_in_one_line_or_in_a_result(model, arguments):
    folder, config = model
    for seed in SEEDS:
        (folder / "config.json").write_bytes(mutated(config, seed))
        failure = failure_of(folder, *arguments)
        assert failure is None, f"seed {seed}: {(folder / 'config.json').read_bytes()!r}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize(
    "architectures", [5, True, "BertForMaskedLM", {"a": 1}, [[]], [5]], ids=str
)
def test_architectures_may_be_anything(tmp_path, arguments, architectures):
    folder = save_case(tmp_path / "model", "bert")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    assert failure_of(folder, *arguments) is None


def test_a_model_without_a_language_models_head_is_refused_by_generate(tmp_path, capsys):
    folder = save_model(tmp_path / "model", "bert")
    assert failure_of(folder, *ARGUMENTS["generate"]) is None
    from layerstream.tools.cli import main

    assert main(["generate", str(folder), "--prompt-ids", "3,4"]) == 1
    assert "is a BertModel, which does not generate text" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "vocab.txt"])
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_a_pipe_or_a_device_among_the_files_is_refused_and_not_read(tmp_path, name, kind):
    folder = save_case(tmp_path / "model")
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for source in (folder, folder / "model.safetensors"):
        if source.is_dir() or name == "config.json":
            with pytest.raises(CheckpointError, match=rf"{name} is no regular file"):
                Checkpoint.open(source)
    assert failure_of(folder, *ARGUMENTS["generate"]) is None


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which "$@" is the command, and $0 a model's folder."""
    command = ["bash", "-c", line, str(folder), sys.executable, "-c", PROGRAM]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ('"$@" plan "$0" >&-', 1, "standard output is closed"),
        ('"$@" plan "$0" >/dev/full', 1, "No space left on device"),
        ('"$@" plan /nowhere <&- >/dev/null', 1, "/nowhere"),
        ('"$@" generate "$0" --prompt-ids 3,4 --max-new-tokens 2 2>&-', 0, ""),
        ('"$@" plan /nowhere 2>&-', 1, ""),
        ('"$@" plan /nowhere 2>/dev/full', 1, ""),
        ('"$@" plan "$0" <&- >&- 2>&-', 1, ""),
    ],
)
def test_standard_streams_may_be_closed_or_full(tmp_path, line, code, error):
    result = shell(line, save_case(tmp_path / "model"))
    assert result.returncode == code, result.stderr
    assert error in result.stderr
    assert len(result.stderr.splitlines()) == bool(error), result.stderr
