"""The command: its output, its exit codes, and errors in one line on stderr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.forked import run_forked
from support.models import save_model

from layerstream.tools.cli import main

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300}


def layerstream(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell would, in an interpreter of its own: its imports and its end are seen, too."""
    program = "import sys; from layerstream.tools.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def layerstream_here(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has imported already what a new one takes seconds for."""
    args = [str(each) for each in arguments]
    try:
        code = main(args)
    except SystemExit as error:  # argparse's way out
        code = int(error.code or 0)
    return subprocess.CompletedProcess(args, code, *capsys.readouterr())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return save_model(tmp_path_factory.mktemp("cli") / "model", "llama", **SMALL)


def test_generate_prints_the_tokens_and_how_long_they_took(model: Path) -> None:
    result = layerstream("generate", model, "--prompt-ids", "3,4,5", "--max-new-tokens", "4")
    assert (result.returncode, result.stdout.count("<")) == (0, 4)
    assert "4 tokens in" in result.stderr
    assert "4 sweeps" in result.stderr


def test_generate_prints_json_with_units_in_the_keys(model: Path) -> None:
    options = ("--prompt-ids", "3,4,5", "--max-new-tokens", "4", "--host", "64MiB", "--json")
    result = run_forked("generate", model, *options, "--reader", "direct")
    report = json.loads(result.stdout)
    assert report["new_tokens"] == len(report["token_ids"]) == 4
    assert report["host_budget_bytes"] == 64 << 20
    assert report["tokens_per_second"] > 0
    assert [stage["name"] for stage in report["stages"]] == ["read", "transfer", "compute"]


def test_a_process_whose_address_space_cannot_hold_the_files_reads_them_directly(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama", **SMALL)
    size = 2 << 30  # of a tensor that the model does not use, in a file of holes
    entry = {"unused": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    with (folder / "other.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    program = (
        "import resource, sys, psutil, transformers, layerstream.pipeline.model\n"
        "from layerstream.tools.cli import main\n"
        "limit = psutil.Process().memory_info().vms + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(main())"
    )
    options = ["--prompt-ids", "3,4", "--max-new-tokens", "2", "--device", "cpu"]
    result = run_forked("generate", folder, *options, program=program)
    assert (result.returncode, result.stdout.count("<")) == (0, 2), result.stderr
    assert "the address space (ulimit -v) cannot hold a mapping of the files" in result.stderr


def test_demo_streams_a_given_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    made = layerstream_here(
        capsys, "make-checkpoint", folder, "--like", "demo", "--layers", "6", "--hidden", "512"
    )
    assert made.returncode == 0, made.stderr
    result = run_forked("demo", folder, "--max-new-tokens", "3", "--host", "80MiB")
    assert result.returncode == 0, result.stderr
    for words in ("tokens/s", "read", "transfer", "compute", "Memory:", "of a host budget"):
        assert words in result.stdout


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


BAD = {
    "a missing folder": (lambda at: at / "nowhere", (), "nowhere"),
    "no weights": (lambda at: empty(at / "empty"), (), "safetensors"),
    "an unknown hub id": (lambda _: "nobody/no-such-model", (), "nobody/no-such-model"),
    "too small a budget": (None, ("--host", "1MiB"), "raise the budget"),
    "more than the machine has": (None, ("--host", "900TiB"), "more than"),
    "a device that is not there": (None, ("--device", "cuda:77"), "cuda:77"),
    "a VRAM budget on the CPU": (None, ("--device", "cpu", "--vram", "1GiB"), "VRAM"),
    "a token that the model does not have": (None, ("--prompt-ids", "99999"), "99999"),
}


# What a process of its own shows besides: nothing at exit, and no network.
IN_A_PROCESS = {"an unknown hub id"}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_1(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, options, message = BAD[case]
    prompt = () if "--prompt-ids" in options else ("--prompt-ids", "3,4")
    path = model if source is None else source(tmp_path)
    arguments = ("generate", path, *prompt, *options)
    if case in IN_A_PROCESS:
        result = layerstream(*arguments)
    else:
        result = layerstream_here(capsys, *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("layerstream: error:")]
    assert len(lines) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x", "--prompt-ids", "a,b"],
        ["generate", "x", "--prompt-ids", "1", "--host", "lots"],
        ["generate", "x", "--prompt-ids", "1", "--max-new-tokens", "0"],
        ["no-such-command"],
        ["make-checkpoint", "x", "--like", "no-such-family"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = layerstream_here(capsys, *arguments)
    assert result.returncode == 2
    assert "usage:" in result.stderr
    assert "Traceback" not in result.stderr
