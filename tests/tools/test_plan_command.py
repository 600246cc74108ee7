"""``layerstream plan``: dry runs of this machine and of others, and one line for whatever goes wrong."""

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import save_model

from layerstream.pipeline import Budget, Checkpoint, Hardware, Plan, PlanError, StreamedModel
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.machine.measurement import ComputeRate, Figure, Origin
from layerstream.pipeline.planning.layout import planned_layers
from layerstream.pipeline.planning.what_if import WhatIf
from layerstream.tools.cli import main

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300}
ELSEWHERE = [
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


WITHOUT_TRANSFORMERS = """
import sys
for name in ("transformers", "huggingface_hub", "safetensors.torch"):
    sys.modules[name] = None  # importing it raises ImportError
from layerstream.tools.cli import main
sys.exit(main())
"""


def test_a_machine_that_is_elsewhere_is_planned_for_without_transformers_or_weights(
    huge: Path,
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS, "plan", str(huge), *ELSEWHERE],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ.copy(),
    )
    assert (result.returncode, result.stderr) == (0, "")
    decision, _, why = result.stdout.partition("Check it")
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
        assert words in why
    assert "measured" not in why  # of a sparse file, and of another machine, nothing is


def test_the_plan_of_a_405b_keeps_to_both_budgets_and_spreads_what_stays(
    huge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(printed(capsys, huge, *ELSEWHERE, "--json"))
    summary, plan = report["summary"], Plan.from_json(json.dumps(report["plan"]))
    assert summary["vram_used_bytes"] <= summary["vram_budget_bytes"] == 24 * 10**9
    assert summary["host_used_bytes"] <= summary["host_budget_bytes"] == 128 * 10**9
    names = [name for batch in plan.batches for name in batch.layers]
    assert sum(name.startswith("model.layers.") for name in names) == len(set(names)) - 1 == 126
    stay = [batch.index for batch in plan.batches if not batch.streamed]
    gaps = [after - before for before, after in itertools.pairwise(stay)]
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


def test_this_machine_is_asked_for_its_memory_and_told_so(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, model, "--device", "cpu", "--host", "50%")
    line = next(line for line in text.splitlines() if "host RAM, free" in line)
    assert line.endswith("measured just now")
    assert "what-if" not in text


def test_of_a_sparse_file_no_disk_rate_is_called_measured(
    huge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, huge, "--device", "cuda:9", "--vram", "24GB", "--fresh")
    (disk,) = [line for line in text.splitlines() if "disk, direct reads" in line]
    assert disk.endswith("ASSUMED")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "marian"])
def test_what_is_planned_to_stream_is_what_the_model_streams(tmp_path: Path, family: str) -> None:
    """Tables are gathered in both; a tied one streams with the head."""
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
    "more than is asked about": (["--ram", "1GiB", "--host", "2GiB"], "more than the 1 GiB"),
    "too little": (["--host", "17MiB", "--batch-size", "4000"], "at least .* raise the budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_1(
    case: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = BAD[case]
    source = [] if options[0] == "nowhere/at/all" else [str(model)]
    assert main(["plan", *source, *options]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("layerstream: error:")
    assert re.search(says, line)
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


HERE = Hardware(
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


def test_where_nothing_is_asked_the_machine_is_as_it_is() -> None:
    assert WhatIf().complete(HERE, Budget(host="4GiB")) is HERE
    assert WhatIf().notes(HERE) == ()


def test_a_gpu_that_is_not_here_takes_nothing_from_this_processor() -> None:
    asked = WhatIf(missing_device="cuda:0", h2d_bytes_per_second=2.5e10)
    there = asked.complete(HERE, Budget(vram="24GiB", host="64GiB"))
    assert (there.device, there.vram_free_bytes) == ("cuda:0", 24 * GIB)
    assert there.host_available_bytes == 64 * GIB
    assert there.compute == ()
    assert there.overhead_seconds_per_batch is None
    assert there.host_copy_bytes_per_second is None
    assert there.h2d_bytes_per_second == 2.5e10
    assert there.disk_bytes_per_second == 2e9  # nobody asked about another disk
    assert there.figures["disk_bytes_per_second"].origin is Origin.CACHED
    assert there.figures["vram_free_bytes"].origin is Origin.GIVEN
    assert any("CUDA context" in note for note in asked.notes(there))


def test_another_disk_is_as_fast_as_given_and_begins_cold() -> None:
    there = WhatIf(disk_bytes_per_second=7e9).complete(HERE, Budget())
    assert there.disk_bytes_per_second == 7e9
    assert there.mmap_bytes_per_second is None
    assert there.cached_bytes == 0
    assert there.figures["disk_bytes_per_second"].origin is Origin.GIVEN
    assert there.compute == HERE.compute


def test_a_budget_of_less_than_this_machine_leaves_its_size_alone() -> None:
    asked = WhatIf(disk_bytes_per_second=7e9)
    assert asked.complete(HERE, Budget(host="4GiB")).host_available_bytes == 16 * GIB
    assert asked.complete(HERE, Budget(host="50%")).host_available_bytes == 16 * GIB


def test_ram_that_is_given_is_what_there_is() -> None:
    assert WhatIf(ram_bytes=GIB).complete(HERE, Budget()).host_available_bytes == GIB
    assert WhatIf(ram_bytes=GIB).complete(HERE, Budget(host="2GiB")).host_available_bytes == GIB


def test_figures_that_make_no_sense_are_refused() -> None:
    with pytest.raises(PlanError, match="disk_bytes_per_second is -1"):
        WhatIf(disk_bytes_per_second=-1.0).complete(HERE, Budget())
