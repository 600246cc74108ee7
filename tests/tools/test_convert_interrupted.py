"""A conversion that is interrupted goes on, and ends with the same bytes; nothing else is ever overwritten."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.forked import run_forked
from support.gguf_models import save_gguf_model
from support.models import save_model
from support.quantized import save_quantised

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.tools.cli import main
from layerstream.tools.convert import journal

MIB = 1 << 20
ARGUMENTS = ("--to", "int4", "--group-size", "16", "--max-shard-size", "12KB")

# Kills itself when it is about to do something to a file for the n-th time.
KILLED = """
import os, signal, sys
from layerstream.tools import cli
name, left = sys.argv[1], int(sys.argv[2])
original = getattr(os, name)

def counting(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(os, name, counting)
sys.exit(cli.main(sys.argv[3:]))
"""

# Prints how much more memory converting takes at its peak than is in use before, which importing and tracing have taken.
MEASURED = """
import re, sys
from pathlib import Path
from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.tools.convert.conversion import convert, plan_conversion
from layerstream.tools.convert.encoding import Encoding, Target
import compressed_tensors.quantization.utils, compressed_tensors.compressors

def memory(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

plan = plan_conversion(
    Checkpoint.open(sys.argv[1]), Path(sys.argv[2]), Encoding.of(Target(sys.argv[3])), max_shard_bytes=10**8
)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
convert(plan)
print(memory("VmHWM") - before)
"""


class Case(NamedTuple):
    source: Path
    folder: Path
    """Where it is converted to; not there yet."""
    expected: dict[str, bytes]
    """The files of a conversion that was not interrupted."""

    def convert(self, *arguments: str) -> int:
        return main(["convert", str(self.source), str(self.folder), *(arguments or ARGUMENTS)])


@pytest.fixture
def case(tmp_path: Path) -> Case:
    source = save_model(tmp_path / "model", "llama", torch.bfloat16)
    whole = tmp_path / "whole"
    assert main(["convert", str(source), str(whole), *ARGUMENTS]) == 0
    return Case(source, tmp_path / "converted", contents(whole))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("layerstream: error: ")
    return error


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> list[int]:
    """Press Ctrl-C when ``owner.name`` is called for the ``at``-th time; returns a list of one number, how often it was."""
    original = getattr(owner, name)
    calls = [0]

    def counting(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize(("name", "at"), [("pwrite", 40), ("fsync", 4), ("replace", 6)])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(case: Case, name: str, at: int) -> None:
    command = ["convert", str(case.source), str(case.folder), *ARGUMENTS]
    killed = run_forked(name, str(at), *command, program=KILLED)
    assert killed.returncode == -signal.SIGKILL
    assert case.convert() == 0
    assert contents(case.folder) == case.expected


@pytest.mark.parametrize(
    ("owner", "name"), [(SourceReader, "read"), (os, "pwrite"), (os, "fsync"), (Path, "replace")]
)
def test_ctrl_c_at_any_time_leaves_a_folder_in_which_the_same_command_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    at, calls = 1, [1]
    while True:
        with monkeypatch.context() as patched:
            calls = interrupt(patched, owner, name, at)
            code = case.convert()
        if calls[0] < at:
            break
        assert code == 130
        assert not (case.folder / "config.json").exists() or at == calls[0]
        assert case.convert() == 0
        assert contents(case.folder) == case.expected
        shutil.rmtree(case.folder)
        at += 7
    assert at > 7


def test_finished_files_are_kept_and_the_report_counts_them(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", str(case.source), str(case.source.with_name("again")), *ARGUMENTS, "--json"])
    whole = json.loads(capsys.readouterr().out)
    with monkeypatch.context() as patched:
        interrupt(patched, SourceReader, "read", 12)
        assert case.convert() == 130
    assert "the same command goes on" in capsys.readouterr().err
    finished = json.loads((case.folder / journal.JOURNAL).read_text())["finished"]
    assert finished
    assert not list(case.folder.glob("*.safetensors"))
    assert case.convert(*ARGUMENTS, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reused_shards"] == len(finished) < report["shards"]
    assert report["layers"] == whole["layers"]


def test_a_finished_file_that_was_changed_is_written_again(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, SourceReader, "read", 16)
        assert case.convert() == 130
    finished = list(json.loads((case.folder / journal.JOURNAL).read_text())["finished"])
    assert len(finished) >= 2
    first, second = (case.folder / f"{name}{journal.PARTIAL}" for name in finished[:2])
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    capsys.readouterr()
    assert case.convert(*ARGUMENTS, "--json") == 0
    assert json.loads(capsys.readouterr().out)["reused_shards"] == len(finished) - 2
    assert contents(case.folder) == case.expected


def test_an_unfinished_folder_takes_no_other_conversion_and_no_other_files(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, SourceReader, "read", 12)
        assert case.convert() == 130
    before = contents(case.folder)
    assert case.convert("--to", "int8") == 1
    assert re.search(r"unfinished conversion .*--to, --group-size.* differ", error_line(capsys))
    os.utime(case.source / "model.safetensors", ns=(1, 1))
    assert case.convert() == 1
    assert re.search(r"source files differ", error_line(capsys))
    assert contents(case.folder) == before
    (case.folder / journal.JOURNAL).write_text("{}")
    assert case.convert() == 1
    assert re.search(rf"{journal.JOURNAL} is damaged .*; remove", error_line(capsys))


def test_files_that_others_put_into_an_unfinished_folder_stop_it(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, SourceReader, "read", 12)
        assert case.convert() == 130
    (case.folder / "mine.txt").write_text("mine")
    assert case.convert() == 1
    assert re.search(r"and other files, such as mine.txt; move", error_line(capsys))


def test_a_folder_with_anything_in_it_is_refused(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.folder.mkdir()
    assert case.convert() == 0
    before = contents(case.folder)
    assert case.convert() == 1
    assert re.search(r"holds other files, such as .*nothing is overwritten", error_line(capsys))
    assert contents(case.folder) == before
    itself = ["convert", str(case.source), str(case.source), *ARGUMENTS]
    assert main(itself) == 1
    assert re.search(r"holds other files", error_line(capsys))
    itself[2] = str(case.source / "config.json")
    assert main(itself) == 1
    assert re.search(r"config.json is a file; give a new or empty folder", error_line(capsys))


def test_two_processes_do_not_write_into_one_folder(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.folder.mkdir()
    with journal.locked(case.folder):
        assert case.convert() == 1
    assert re.search(r"Another process is converting into", error_line(capsys))


def test_a_disk_without_room_is_refused_before_anything_is_written(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(case.source)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert case.convert() == 1
    assert re.search(r"needs .* KiB, and the disk of .* has 9.77 KiB free", error_line(capsys))
    assert contents(case.folder) == {}


def test_a_disk_that_fills_meanwhile_ends_it_in_a_sentence_and_it_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert case.convert() == 1
    assert re.search(r"cannot be written: No space left.*same command goes on", error_line(capsys))
    assert case.convert() == 0
    assert contents(case.folder) == case.expected


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_refused_with_file_and_tensor(
    case: Case, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    path = case.source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float(value)
    save_file(tensors, path)
    assert case.convert() == 1
    words = r"model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or infinite"
    assert re.search(words, error_line(capsys))


def test_sources_that_are_packed_already_are_refused_by_name(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = save_quantised(case.source.with_name("packed"), "llama", "fp8-blocks")
    assert main(["convert", str(packed), str(case.folder), *ARGUMENTS]) == 1
    assert re.search(r"quantised already, with 'fp8'.*; convert the checkpoint", error_line(capsys))
    gguf = save_gguf_model(case.source.with_name("model.gguf"), "llama")
    assert main(["convert", str(gguf), str(case.folder), *ARGUMENTS]) == 1
    assert re.search(r"model.gguf is a GGUF file.*; convert the checkpoint", error_line(capsys))
    assert not case.folder.exists()


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("llama", ["--to", "fp8", "--group-size", "16"], r"fp8 has one scale.*--group-size"),
        ("llama", ["--to", "int4"], r"group size, 128\); use it as it is, or give a smaller"),
        ("gpt2", ["--to", "int8"], r"no weights of linear layers"),
        (
            "qwen3-moe",
            ["--to", "int4", "--group-size", "32"],
            r"'model.*group size, 32\).*or give a smaller --group",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_before_a_folder_is_made(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    arguments: list[str],
    words: str,
) -> None:
    source = save_model(tmp_path / "model", kind, torch.bfloat16)
    assert main(["convert", str(source), str(tmp_path / "converted"), *arguments]) == 1
    assert re.search(words, error_line(capsys))
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("target", ["fp8", "int4"])
def test_converting_takes_a_constant_amount_of_memory(tmp_path: Path, target: str) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process's memory cannot be reset here: no /proc/self/clear_refs")
    shape = ["--like", "llama-3.2-1b", "--layers", "2", "--hidden", "2048", "--vocab", "64000"]
    source = tmp_path / "model"
    assert main(["make-checkpoint", str(source), *shape]) == 0
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "converted"), target],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    infos = Checkpoint.open(source).tensors.values()
    layer_bytes = sum(info.nbytes for info in infos if ".layers.1." in info.name)
    assert 0 < int(result.stdout) < 64 * MIB < layer_bytes
