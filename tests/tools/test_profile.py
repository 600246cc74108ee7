"""``layerstream profile``: its report, its files, and errors in one line."""

import argparse
import asyncio
import errno
import importlib.util
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.adapters import lora, save_adapter
from support.checkpoints import CPU, plan_for
from support.models import save_model

from layerstream.pipeline.checkpoint.adapter_folder import resolve_sources
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import Activity
from layerstream.stages.telemetry.timings import Timings
from layerstream.tools.cli import main
from layerstream.tools.console import plot, progress
from layerstream.tools.running.sweeps import profile_model

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return save_model(tmp_path_factory.mktemp("profile") / "model", "llama", **SMALL)


def test_it_prints_json_with_units_in_the_keys(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    options = ("--sweeps", "4", "--layer-batch-size", "1", "--reader", "direct", "--json")
    assert main(["profile", str(model), *options, "--trace", str(trace)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompt_tokens"], report["measured_sweeps"]) == (16, 3)
    assert len(report["sweep_seconds"]) == 4
    assert report["least_sweep_seconds"] <= report["median_sweep_seconds"]
    assert report["predicted_sweep_seconds"] > 0
    forecast = report["forecast"]
    assert forecast["sweeps"] == 3
    assert forecast["predicted"]["seconds"] == pytest.approx(3 * report["predicted_sweep_seconds"])
    assert forecast["measured"]["seconds"] == pytest.approx(sum(report["sweep_seconds"][1:]))
    predicted, measured = forecast["predicted"]["seconds"], forecast["measured"]["seconds"]
    assert forecast["errors"]["sweep"] == pytest.approx(predicted / measured - 1)
    assert 0 < report["overlap_efficiency"] <= 1
    assert report["bottleneck"]["sentence"]
    assert [stage["name"] for stage in report["stages"]] == ["read", "transfer", "compute"]
    keys = {"busy_seconds", "waited_in_seconds", "waited_out_seconds", "bytes_per_second"}
    assert keys < report["stages"][0].keys()
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_full_disk_costs_the_trace_and_not_the_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["profile", str(model), "--sweeps", "1", "--no-compute", "--trace"]
    assert main([*options, "/dev/full"]) == 1
    out, err = capsys.readouterr()
    assert "Each sweep" in out
    assert "No space left on device: '/dev/full'" in err
    write_text = Path.write_text

    def full(path: Path, text: str, **options: Any) -> None:
        write_text(path, text[:100], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert main([*options, str(tmp_path / "trace.json")]) == 1
    assert not any(tmp_path.iterdir())


def test_it_prints_a_table_and_the_bottleneck_of_a_throttled_disk(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_for(model, CPU, reader="throttled")
    slot_bytes = 3 * max(batch.host_bytes for batch in plan.batches)  # none for residents
    options = ("--no-compute", "--sweeps", "3", "--throttle", "1MB", "--layer-batch-size", "1")
    budget = str(plan.host_memory.reserved_bytes + slot_bytes)
    assert main(["profile", str(model), *options, "--host", budget]) == 0
    text = capsys.readouterr().out
    for words in (
        "weights alone",
        "waiting out",
        "of the link",
        "Time per sweep: median",
        "Sweep: predicted",
        "Read: predicted",
        "as given",
        "Bottleneck: read",
    ):
        assert words in text


def test_weights_without_a_config_are_streamed_without_computation(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").hardlink_to(model / "model.safetensors")
    assert main(["profile", str(tmp_path), "--sweeps", "1", "--no-ceiling", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompt_tokens"] is None
    assert report["measured_sweeps"] == 1


def test_an_adapter_alone_is_profiled_with_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "model", "llama")
    kind = transformers.LlamaForCausalLM
    adapter = save_adapter(base, tmp_path / "adapter", lora(), model_class=kind)
    resident = []
    for options in ([], ["--no-compute"]):
        for path in (adapter, base):
            arguments = ["--sweeps", "1", "--no-ceiling", "--json", "--device", "cpu", *options]
            assert main(["profile", str(path), *arguments]) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["model"] == str(path)
            assert report["measured_sweeps"] == 1
            resident.append(report["adapter_bytes"])
    assert resident[0] > 0 == resident[1]
    assert resident[2] > 0 == resident[3]


def test_a_model_with_encoder_and_decoder_can_be_profiled(tmp_path: Path) -> None:
    args = argparse.Namespace(
        device="cpu",
        vram=None,
        host=None,
        reader=None,
        kernels="exact",
        dtype="auto",
        throttle=None,
        layer_batch_size=1,
        no_compute=False,
        no_ceiling=True,
        prompt_tokens=3,
        sweeps=2,
        experts=None,
    )
    profile = asyncio.run(
        profile_model(resolve_sources(save_model(tmp_path / "t5", "t5")), args=args)
    )
    assert len(profile.sweep_seconds) == 2
    assert profile.steady.stages[2].items == len(profile.plan.batches)


class FakeStderr(io.StringIO):
    """A stream that sets an event when it is written to; a terminal or not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.written = threading.Event()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        count = super().write(text)
        self.written.set()
        return count


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich")
def test_a_terminal_shows_slow_operations_while_they_last_but_not_fast_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = FakeStderr(terminal=True)
    monkeypatch.setattr("sys.stderr", stderr)
    with progress.waiting("blinking"):
        pass
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    with progress.waiting("opening"):
        assert stderr.written.wait(20)
    assert "opening" in stderr.getvalue()
    assert "blinking" not in stderr.getvalue()


def test_without_a_terminal_no_progress_is_written_to_stderr(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = FakeStderr(terminal=False)
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    with progress.waiting("opening"):
        pass
    assert stderr.getvalue() == ""


BAD = {
    "a missing folder": (["nowhere/at/all"], "nowhere"),
    "too small a budget": (["--host", "1MiB"], "raise the budget"),
    "a rate for a reader without one": (["--reader", "mmap", "--throttle", "1MB"], "throttled"),
    "a trace in a missing folder": (["--trace", "no/such/folder/trace.json"], "no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_1(
    case: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, message = BAD[case]
    source = [] if options[0] == "nowhere/at/all" else [str(model)]
    assert main(["profile", *source, *options]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_the_error_for_a_model_without_tokens_names_the_alternative(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(save_model(tmp_path / "vit", "vit"))]) == 1
    assert "--no-compute" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--sweeps", "0"], ["--plot", "x.bmp"], ["--throttle", "no"]])
def test_wrong_usage_is_exit_code_2(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["profile", "x", *options])


def some_timings() -> Timings:
    clock = Clock("read")
    clock.add(Activity.WORKING, 0.0, 2.0, batch=0, nbytes=100)
    clock.add(Activity.WAITING_OUT, 2.0, 3.0, batch=1)
    return Timings(sweeps=1, wall_seconds=3.0, stages=(clock.sums(), Clock("compute").sums()))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_suffix_decides_the_format_of_the_timeline(
    name: str, begins: bytes, tmp_path: Path
) -> None:
    plot.write_timeline(some_timings(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import_module = plot.importlib.import_module

    def missing(name: str) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return import_module(name)

    monkeypatch.setattr(plot.importlib, "import_module", missing)
    assert main(["profile", str(model), "--plot", str(tmp_path / "stages.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "layerstream[plot]" in line


def test_it_shows_what_other_ways_to_keep_experts_would_have_hit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = save_model(tmp_path / "mixture", "qwen3-moe", num_experts=8)
    options = ("--experts", "20", "--sweeps", "1", "--host", "50MiB", "--device", "cpu")
    options += ("--reader", "direct", "--no-ceiling")
    assert main(["profile", str(mixture), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["experts_on_demand"]
    assert found["decoded_tokens"] == 20
    assert found["dropped_demands"] == 0
    assert 0 < found["expert_hits"] <= found["experts_wanted"]
    for each in (found["with_the_plans_cells"], *found["by_cells"]):
        assert each["wanted"] >= 19 * 2  # two experts a token, in each layer
        assert each["optimal_hits"] >= max(each["quota_lru_hits"], each["global_lru_hits"])
    sizes = [each["cells"] for each in found["by_cells"]]
    assert sizes == sorted(sizes)
    assert sizes[-1] == found["experts"]
    assert found["with_the_plans_cells"]["cells"] == found["expert_cells"]

    assert main(["profile", str(mixture), *options]) == 0
    printed = capsys.readouterr().out
    assert "best possible" in printed
    assert "20 tokens wanted" in printed


def test_experts_are_refused_where_none_are_read_on_demand(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, reason in (
        (("--no-compute",), "--experts needs computation"),
        ((), "this plan has none"),
    ):
        assert main(["profile", str(model), "--experts", "2", "--sweeps", "1", *options]) == 1
        assert reason in capsys.readouterr().err
