"""The check of the CUDA path: without a GPU it can be rehearsed, and then measures nothing."""

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
from layerstream.tools.benchmarks.accelerator import Accelerator
from layerstream.tools.benchmarks.gpu_bench import MIB, Bench, GpuRow, RowResult
from layerstream.tools.benchmarks.gpu_models import measure_decoding
from layerstream.tools.benchmarks.gpu_rows import ROWS
from layerstream.tools.benchmarks.overlap import draw_lanes, overlap_share
from layerstream.tools.synthetic.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"


def test_a_rehearsal_runs_every_row_and_records_no_result(tmp_path):
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


def test_an_existing_checkpoint_is_used(tmp_path, monkeypatch, capsys):
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


def test_a_row_that_hangs_is_given_up_and_the_others_are_measured(tmp_path, monkeypatch):
    given_up, commands = threading.Event(), []

    def quick(_):
        monkeypatch.setattr(gpu, "_ROW_SECONDS", 0.01 if not commands else 1000)
        return RowResult(ratio=None, says="", details={})

    def hangs(_):
        assert given_up.wait(60)
        raise SystemExit  # as if the process had been replaced

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


def test_probing_is_not_counted_in_a_rows_peak_memory(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "model", gpu._checkpoint_spec(rehearse=True)).folder
    accelerator = Accelerator(device=torch.device("cpu"))
    bench = Bench(
        accelerator=accelerator,
        folder=folder,
        out=tmp_path,
        sweeps=1,
        block_bytes=(MIB,),
        pin_bytes=MIB,
    )
    watching, probed_while_watching = [], []
    watched, probe = Accelerator.watched, Hardware.probe

    @contextmanager
    def recorded_watched(self):
        watching.append(True)
        with watched(self) as peak:
            yield peak
        watching.clear()

    async def recorded_probe(*args, **options):
        probed_while_watching.append(bool(watching))
        return await probe(*args, **options)

    monkeypatch.setattr(Accelerator, "watched", recorded_watched)
    monkeypatch.setattr(Hardware, "probe", recorded_probe)
    measure_decoding(0.5)(bench)  # its model would probe by itself
    assert probed_while_watching
    assert not any(probed_while_watching)


class GrowingMachine:
    """A fake machine whose memory grows by a step in every wait, up to ``most`` steps."""

    def __init__(self, monkeypatch, *, first, most):
        self.total, self.most, self.claimed, self.peak = first, most, 0, 0
        self.now = 0.0
        monkeypatch.setattr(copying, "host_available_bytes", self.available)
        monkeypatch.setattr(copying, "HostMemory", lambda _: self.claim())
        monkeypatch.setattr(copying, "time", self)

    def available(self):
        return (self.total - self.claimed) * copying._STEP_BYTES

    def claim(self):
        self.claimed += 1
        self.peak = max(self.peak, self.claimed)
        return SimpleNamespace(tensor=torch.empty(0), close=self.release)

    def release(self):
        self.claimed -= 1

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.total = min(self.total + 1, self.most)


def test_memory_is_claimed_until_a_growing_machine_has_enough(monkeypatch):
    machine = GrowingMachine(monkeypatch, first=6, most=64)
    copying.claim_host_memory(32 * copying._STEP_BYTES)
    assert machine.total >= 32
    assert machine.claimed == 0


def test_a_machine_without_more_memory_is_neither_filled_nor_waited_for(monkeypatch):
    machine = GrowingMachine(monkeypatch, first=6, most=6)
    copying.claim_host_memory(32 * copying._STEP_BYTES)
    assert machine.claimed == 0
    assert machine.peak == 3
    assert machine.now < 6


def test_nothing_is_claimed_where_enough_memory_is_free(monkeypatch):
    machine = GrowingMachine(monkeypatch, first=64, most=64)
    copying.claim_host_memory(32 * copying._STEP_BYTES)
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
def test_overlap_is_the_share_of_the_kernels_time_in_which_a_copy_ran(copies, kernels, share):
    assert overlap_share(copies, kernels) == share


def test_the_picture_has_a_lane_for_copies_and_one_for_kernels():
    drawn = draw_lanes([(0, 5), (7, 9)], [(1, 2)], title="both")
    assert drawn.count('fill="#3572b0"') == 2
    assert drawn.count('fill="#d98032"') == 1
    assert draw_lanes([], [], title="nothing").count("<rect") == 0
