"""``layerstream plan``: dry runs for this machine and for others, and errors in one line."""

import asyncio
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest
from support.models import save_model

from layerstream.pipeline import Budget, Checkpoint, Hardware, Plan, PlanError, StreamedModel
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.machine.measurement import ComputeRate, Figure, Origin
from layerstream.pipeline.planning.planned_layers import planned_layers
from layerstream.pipeline.planning.what_if import WhatIf
from layerstream.tools.cli import main

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300}
OTHER_MACHINE = [
    "--device",
    "cuda",
    "--vram",
    "24GB",
    "--host",
    "128GB",
    "--disk-bandwidth",
    "7GB/s",
    "--h2d-bandwidth",
    "25GB/s",
]
GIB = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return save_model(tmp_path_factory.mktemp("plan") / "model", "llama", **SMALL)


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true shapes of a model of 405 billion parameters, and no bytes."""
    folder = tmp_path_factory.mktemp("plan") / "l405"
    assert main(["make-checkpoint", str(folder), "--like", "llama-3.1-405b", "--sparse"]) == 0
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


CODE_BYTES = """
import asyncio, sys
from layerstream.pipeline import StreamedModel

async def main():
    async with StreamedModel.open(sys.argv[1], device="cpu", measure=False) as model:
        print(model.plan.overhead_bytes)

asyncio.run(main())
"""


def test_the_memory_of_code_is_about_what_a_process_takes(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = json.loads(printed(capsys, model, "--device", "cpu", "--json"))["plan"]
    taken = subprocess.run(
        [sys.executable, "-P", "-c", CODE_BYTES, str(model)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert planned["overhead_bytes"] == pytest.approx(int(taken.stdout), rel=0.25)


WITHOUT_TRANSFORMERS = """
import sys
from html import escape
for name in ("transformers", "huggingface_hub", "safetensors.torch"):
    sys.modules[name] = None  # importing it raises ImportError
from layerstream.tools.cli import main
sys.exit(main())
"""


def test_another_machine_is_planned_for_without_transformers_or_weights(
    huge: Path,
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS, "plan", str(huge), *OTHER_MACHINE],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ.copy(),
    )
    assert (result.returncode, result.stderr) == (0, "")
    decision, _, reasons = result.stdout.partition("Check it")
    for words in (
        "on cuda:0",
        "127 layer batches",
        "22.4 GiB",
        "119 GiB",
        "tokens/s",
        "bottleneck",
    ):
        assert words in decision
    for words in ("1 (trivial)", "What would help", "disk, direct reads", "ASSUMED", "what-if"):
        assert words in reasons
    assert "measured" not in reasons  # sparse files and other machines cannot be measured


def test_the_plan_of_a_405b_keeps_to_both_budgets_and_spreads_its_residents(
    huge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(printed(capsys, huge, *OTHER_MACHINE, "--json"))
    summary, plan = report["summary"], Plan.from_json(json.dumps(report["plan"]))
    assert summary["vram_used_bytes"] <= summary["vram_budget_bytes"] == 24 * 10**9
    assert summary["host_used_bytes"] <= summary["host_budget_bytes"] == 128 * 10**9
    names = [name for batch in plan.batches for name in batch.layers]
    assert sum(name.startswith("model.layers.") for name in names) == len(set(names)) - 1 == 126
    residents = [batch.index for batch in plan.batches if not batch.streamed]
    gaps = [after - before for before, after in itertools.pairwise(residents)]
    assert max(gaps) <= min(gaps) + 3
    sweep = plan.disk_bytes_per_sweep / 7e9
    assert sweep <= summary["predicted_sweep_seconds"] < 1.02 * sweep
    assert "overhead_seconds_per_batch" in summary["assumed"]
    assert "disk_bytes_per_second" not in summary["assumed"]


def test_markdown_has_headings_and_tables(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, model, "--markdown")
    assert text.startswith("## ")
    assert text.count("\n## ") == 4
    assert "| --- " not in text
    assert "| :--- | ---: |" in text


def test_the_report_as_one_page_needs_nothing_else(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = tmp_path / "plan.html"
    monkeypatch.chdir(model.parent)
    text = printed(capsys, Path(model.name), "--device", "cpu", "--html", str(page))
    assert text.startswith(f"{model.name}: ")
    html = page.read_text(encoding="utf-8")
    plan = Plan.from_json(
        json.dumps(json.loads(printed(capsys, model, "--device", "cpu", "--json"))["plan"])
    )
    assert html.count("<i class=") == len(plan.batches)
    assert html.count('class="bar"') == 1
    for title in (line for line in text.splitlines() if line and not line.startswith(" ")):
        assert escape(title) in html
    assert re.search(r"default-src 'none'; style-src 'unsafe-inline'", html)
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|https?:", html)


def test_the_page_of_a_plan_shows_names_of_a_checkpoint_as_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "<b>&amp;"
    shutil.copytree(model, folder)
    page = tmp_path / "plan.html"
    printed(capsys, folder, "--device", "cpu", "--html", str(page))
    html = page.read_text(encoding="utf-8")
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;amp;" in html


def test_the_report_says_that_this_machines_memory_was_measured(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, model, "--device", "cpu", "--host", "50%")
    line = next(line for line in text.splitlines() if "host RAM, free" in line)
    assert line.endswith("measured just now")
    assert "what-if" not in text


def test_the_disk_rate_of_a_sparse_file_is_assumed(
    huge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, huge, "--device", "cuda:9", "--vram", "24GB", "--fresh")
    (disk,) = [line for line in text.splitlines() if "disk, direct reads" in line]
    assert disk.endswith("ASSUMED")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "marian"])
def test_the_planned_tensors_are_those_that_the_model_streams(tmp_path: Path, family: str) -> None:
    """Both gather embedding tables; a tied table streams with the head."""
    folder = save_model(tmp_path / "model", family)
    checkpoint = Checkpoint.open(folder)
    layers = planned_layers(checkpoint, group_layers(checkpoint), gathers_tables=True)
    planned = {tensor.extents for layer in layers for tensor in layer.tensors}

    async def streamed() -> Plan:
        async with StreamedModel.open(folder, device="cpu") as opened:
            return opened.plan

    plan = asyncio.run(streamed())
    read = sum(view.nbytes for batch in plan.batches for view in batch.tensors)
    assert read == sum(extent.nbytes for extents in planned for extent in extents)


BAD = {
    "a missing folder": (["nowhere/at/all"], "nowhere"),
    "a GPU of unknown size": (["--device", "cuda:9"], "no cuda:9 here .* such as --vram 24GiB"),
    "a share of it": (["--device", "cuda:9", "--vram", "80%"], "no cuda:9 here to take 80% of"),
    "a device of no kind": (["--device", "tpu"], "'tpu' is not a device"),
    "VRAM of the CPU": (["--device", "cpu", "--vram", "1GiB"], "the device is the CPU"),
    "a link to the CPU": (["--device", "cpu", "--h2d-bandwidth", "1GB/s"], "the device is the CPU"),
    "more than the machine": (["--host", "900TiB"], "more than the .* of host RAM"),
    "more than the given RAM": (["--ram", "1GiB", "--host", "2GiB"], "more than the 1 GiB"),
    "too little": (["--host", "17MiB", "--batch-size", "4000"], "at least .* raise the budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_1(
    case: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = BAD[case]
    source = [] if options[0] == "nowhere/at/all" else [str(model)]
    assert main(["plan", *source, *options]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("layerstream: error:")
    assert re.search(message, line)
    assert not captured.out


@pytest.mark.parametrize(
    "options",
    [
        ["--host", "0"],
        ["--host", "-4GiB"],
        ["--host", "0%"],
        ["--host", "101%"],
        ["--vram", "4 bananas"],
        ["--ram", "50%"],
        ["--disk-bandwidth", "0"],
        ["--disk-bandwidth", "-7GB/s"],
        ["--disk-bandwidth", "7GB/h"],
        ["--h2d-bandwidth", "0GB/s"],
        ["--batch-size", "0"],
        ["--prompt-tokens", "-1"],
        ["--new-tokens", "1.5"],
        ["--objective", "beauty"],
        ["--reader", "telepathy"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "x", *options])


THIS_MACHINE = Hardware(
    device="cpu",
    host_available_bytes=16 * GIB,
    vram_free_bytes=None,
    cores=2,
    cached_bytes=GIB,
    disk_bytes_per_second=2e9,
    mmap_bytes_per_second=1e9,
    host_copy_bytes_per_second=5e9,
    compute=(ComputeRate(tokens=1, bytes_per_second=1e10),),
    overhead_seconds_per_batch=1e-3,
    figures={"disk_bytes_per_second": Figure(origin=Origin.CACHED, age_seconds=60.0)},
)


def test_without_what_ifs_the_hardware_is_unchanged() -> None:
    assert WhatIf().complete(THIS_MACHINE, Budget(host="4GiB")) is THIS_MACHINE
    assert WhatIf().notes(THIS_MACHINE) == ()


def test_a_missing_gpu_takes_no_rates_from_this_processor() -> None:
    what_if = WhatIf(missing_device="cuda:0", h2d_bytes_per_second=2.5e10)
    hardware = what_if.complete(THIS_MACHINE, Budget(vram="24GiB", host="64GiB"))
    assert (hardware.device, hardware.vram_free_bytes) == ("cuda:0", 24 * GIB)
    assert hardware.host_available_bytes == 64 * GIB
    assert hardware.compute == ()
    assert hardware.overhead_seconds_per_batch is None
    assert hardware.host_copy_bytes_per_second is None
    assert hardware.h2d_bytes_per_second == 2.5e10
    assert hardware.disk_bytes_per_second == 2e9  # no other disk is given
    assert hardware.figures["disk_bytes_per_second"].origin is Origin.CACHED
    assert hardware.figures["vram_free_bytes"].origin is Origin.GIVEN
    assert any("CUDA context" in note for note in what_if.notes(hardware))


def test_another_disk_has_the_given_rate_and_a_cold_cache() -> None:
    hardware = WhatIf(disk_bytes_per_second=7e9).complete(THIS_MACHINE, Budget())
    assert hardware.disk_bytes_per_second == 7e9
    assert hardware.mmap_bytes_per_second is None
    assert hardware.cached_bytes == 0
    assert hardware.figures["disk_bytes_per_second"].origin is Origin.GIVEN
    assert hardware.compute == THIS_MACHINE.compute


def test_a_budget_below_this_machines_memory_does_not_change_it() -> None:
    what_if = WhatIf(disk_bytes_per_second=7e9)
    assert what_if.complete(THIS_MACHINE, Budget(host="4GiB")).host_available_bytes == 16 * GIB
    assert what_if.complete(THIS_MACHINE, Budget(host="50%")).host_available_bytes == 16 * GIB


def test_given_ram_replaces_this_machines() -> None:
    assert WhatIf(ram_bytes=GIB).complete(THIS_MACHINE, Budget()).host_available_bytes == GIB
    assert (
        WhatIf(ram_bytes=GIB).complete(THIS_MACHINE, Budget(host="2GiB")).host_available_bytes
        == GIB
    )


def test_invalid_rates_are_refused() -> None:
    with pytest.raises(PlanError, match="disk_bytes_per_second is -1"):
        WhatIf(disk_bytes_per_second=-1.0).complete(THIS_MACHINE, Budget())
