"""The check that proves the CUDA path: without a GPU it can be rehearsed, and then it measures nothing."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from layerstream.pipeline import Hardware
from layerstream.tools.benchmarks import copying, gpu
from layerstream.tools.benchmarks.gpu_bench import MIB, Bench, GpuRow, Result
from layerstream.tools.benchmarks.gpu_models import decode
from layerstream.tools.benchmarks.gpu_rows import ROWS
from layerstream.tools.benchmarks.overlap import overlap_of, picture
from layerstream.tools.synthetic.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"


def test_a_rehearsal_runs_every_row_and_writes_no_figure(tmp_path):
    command = [sys.executable, "-m", "layerstream.tools.benchmarks.gpu", "--rehearse"]
    ran = subprocess.run(
        [*command, "--out", tmp_path / "out"],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert result["rehearsal"]
    assert [row["name"] for row in result["rows"]] == [row.name for row in ROWS]
    assert not any(row["measured"] or row["failed"] or row["result"] for row in result["rows"])
    assert all(
        row["why"] == "rehearsed"
        or row["why"].endswith("is not installed")
        or (row["name"], row["why"]) == ("peak VRAM to budget", "no row before this one used VRAM")
        for row in result["rows"]
    )
    assert (tmp_path / "out" / "gpu_check.txt").read_text().count("not measured") == len(ROWS)
    assert (tmp_path / "out" / "gpu_overlap.svg").read_text().count("<rect") > 2
    assert not list(tmp_path.glob("layerstream*"))  # the checkpoint is gone


def test_a_checkpoint_that_was_made_beforehand_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ROWS", ())
    command = ["gpu", "--rehearse", "--scratch", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--checkpoint-only"])
    assert gpu.main() == 0
    assert not (tmp_path / "out").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()} == before
    assert "model of" in capsys.readouterr().out


def test_a_row_that_hangs_costs_itself_alone(tmp_path, monkeypatch):
    given_up, commands = threading.Event(), []

    def quick(_):
        monkeypatch.setattr(gpu, "_ROW_SECONDS", 0.01 if not commands else 1000)
        return Result(ratio=None, says="", details={})

    def hangs(_):
        assert given_up.wait(60)
        raise SystemExit  # as if the process had become another one

    def execv(_, command):
        commands.append(command)
        monkeypatch.setattr(gpu, "_ROW_SECONDS", 1000)
        given_up.set()

    rows = {"first": quick, "hangs": hangs, "last": quick}
    rows = [GpuRow(name=name, target="-", measure=measure) for name, measure in rows.items()]
    monkeypatch.setattr(gpu, "ROWS", rows)
    monkeypatch.setattr(gpu.os, "execv", execv)
    argv = ["gpu", "--rehearse", "--scratch", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        gpu.main()
    monkeypatch.setattr(sys, "argv", commands[0][2:])
    assert gpu.main() == 1
    written = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["rows"]
    hung = "failed: it had not come to its end in 0 s"
    assert [row["why"] for row in written] == ["rehearsed", hung, "rehearsed"]
    assert [row["failed"] for row in written] == [False, True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_check_says_so_in_a_line_and_leaves_nothing(tmp_path):
    ran = subprocess.run(
        ["bash", SCRIPT],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "TMPDIR": str(tmp_path)},
    )
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1
    assert "sees no CUDA device here; --rehearse" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_probed_while_a_rows_memory_is_watched(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "model", gpu._recipe(rehearse=True)).folder
    accelerator = copying.Accelerator(device=torch.device("cpu"))
    bench = Bench(
        accelerator=accelerator,
        folder=folder,
        out=tmp_path,
        sweeps=1,
        block_bytes=(MIB,),
        pin_bytes=MIB,
    )
    watching, probed = [], []
    watched, probe = copying.Accelerator.watched, Hardware.probe

    @contextmanager
    def noted(self):
        watching.append(True)
        with watched(self) as peak:
            yield peak
        watching.clear()

    async def noting(*args, **options):
        probed.append(bool(watching))
        return await probe(*args, **options)

    monkeypatch.setattr(copying.Accelerator, "watched", noted)
    monkeypatch.setattr(Hardware, "probe", noting)
    decode(0.5)(bench)  # the one whose model would ask for itself
    assert probed
    assert not any(probed)


class Balloon:
    """A machine with so many steps of memory, which gives one more each time that it is asked in vain."""

    def __init__(self, monkeypatch, *, first, most):
        self.total, self.most, self.taken, self.peak = first, most, 0, 0
        self.now = 0.0
        monkeypatch.setattr(copying, "host_available_bytes", self.available)
        monkeypatch.setattr(copying, "HostMemory", lambda _: self.take())
        monkeypatch.setattr(copying, "time", self)

    def available(self):
        return (self.total - self.taken) * copying._STEP_BYTES

    def take(self):
        self.taken += 1
        self.peak = max(self.peak, self.taken)
        return SimpleNamespace(tensor=torch.empty(0), close=self.give_back)

    def give_back(self):
        self.taken -= 1

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.total = min(self.total + 1, self.most)


def test_a_machine_that_grows_as_it_is_used_is_made_to_show_its_memory(monkeypatch):
    machine = Balloon(monkeypatch, first=6, most=64)
    copying.make_room(32 * copying._STEP_BYTES)
    assert machine.total >= 32
    assert machine.taken == 0


def test_a_machine_that_has_no_more_memory_is_not_waited_for_and_not_filled(monkeypatch):
    machine = Balloon(monkeypatch, first=6, most=6)
    copying.make_room(32 * copying._STEP_BYTES)
    assert machine.taken == 0
    assert machine.peak == 3
    assert machine.now < 6


def test_where_there_is_room_none_is_made(monkeypatch):
    machine = Balloon(monkeypatch, first=64, most=64)
    copying.make_room(32 * copying._STEP_BYTES)
    assert machine.peak == 0


def test_an_unknown_argument_of_the_check_is_refused():
    ran = subprocess.run(
        ["bash", SCRIPT, "--fast"], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 2
    assert "usage:" in ran.stderr


def test_the_recorded_table_has_every_row():
    lines = (ROOT / "tools" / "benchmarks" / "gpu.md").read_text(encoding="utf-8").splitlines()
    recorded = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    assert {row.name for row in ROWS} <= recorded


@pytest.mark.parametrize(
    ("copies", "kernels", "share"),
    [
        pytest.param([(0, 10)], [(0, 10)], 1.0, id="all"),
        pytest.param([(0, 5)], [(0, 10)], 0.5, id="half"),
        pytest.param([(0, 2), (8, 12)], [(1, 3), (9, 11)], 0.75, id="pieces"),
        pytest.param([(0, 5)], [(5, 10)], 0.0, id="one after the other"),
        pytest.param([(0, 5)], [], 0.0, id="no kernels"),
    ],
)
def test_overlap_is_the_part_of_the_kernels_time_with_a_copy_beside_it(copies, kernels, share):
    assert overlap_of(copies, kernels) == share


def test_the_picture_has_a_lane_for_copies_and_one_for_kernels():
    drawn = picture([(0, 5), (7, 9)], [(1, 2)], title="both")
    assert drawn.count('fill="#3572b0"') == 2
    assert drawn.count('fill="#d98032"') == 1
    assert picture([], [], title="nothing").count("<rect") == 0
