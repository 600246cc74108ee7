"""The report of a plan: the decision, the arithmetic, the assumptions; as text, as Markdown, as data."""

import dataclasses
import json
import re

import pytest
from support.checkpoints import CPU, GPU, write_checkpoint
from support.plans import plan_of

from layerstream.pipeline import Budget, Checkpoint, Plan, Workload, make_plan
from layerstream.pipeline.machine.measurement import ComputeRate, Figure, Origin
from layerstream.pipeline.report.plan_report import report_plan, summarize_plan

MIB = 1 << 20
SIZES = [MIB, *[4 * MIB] * 20, 2 * MIB]
KNOWN = {
    "disk_bytes_per_second": 1e9,
    "mmap_bytes_per_second": 5e8,
    "host_copy_bytes_per_second": 5e9,
    "h2d_bytes_per_second": 1e10,
    "attention_flops_per_second": 1e12,
    "step_attention_flops_per_second": 1e11,
    "kv_growth_bytes_per_second": 1e10,
    "blocks_per_second": 1e5,
    "compute": (ComputeRate(tokens=1, bytes_per_second=1e11),),
    "direct_read_cpu_seconds_per_byte": 0.0,
    "mmap_read_cpu_seconds_per_byte": 0.0,
    "overhead_seconds_per_batch": 1e-4,
}
FAST_CPU = dataclasses.replace(CPU, **KNOWN)
FAST_GPU = dataclasses.replace(GPU, **KNOWN)


@pytest.fixture
def streamed():
    """A plan for a GPU with residents on both sides."""
    return plan_of(
        SIZES, FAST_GPU, host=16 * MIB + 24 * MIB, vram=64 * MIB + 24 * MIB, workload=Workload()
    )


def bytes_of(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def seconds_of(text):
    number, unit = text.split()
    return float(number) * {"ms": 1e-3, "s": 1}[unit]


def test_bytes_divided_by_seconds_are_the_rates_of_the_hardware(streamed):
    lines = report_plan(streamed).splitlines()
    rates = {"read": 1e9, "transfer": 1e10}
    for stage, rate in rates.items():
        row = next(line for line in lines if re.match(rf"  {stage} +[0-9]", line))
        _, nbytes, busy, quotient = re.split(r"  +", row.strip())
        assert bytes_of(nbytes) / seconds_of(busy) == pytest.approx(rate, rel=0.01)
        assert bytes_of(quotient.removesuffix("/s")) == pytest.approx(rate, rel=0.01)


def test_the_map_has_a_mark_for_each_layer_that_shows_its_residence(streamed):
    lines = [line.strip() for line in streamed.describe().splitlines()]
    drawn = "".join(lines[: lines.index("one mark per layer")]).replace(" ", "")
    marks = re.search(r"[.hd+]{20,}$", drawn)[0]
    expected = ""
    for batch in streamed.batches:
        mark = "." if batch.streamed else "h" if batch.host_resident else "d"
        expected += mark * len(batch.layers)
    assert marks == expected
    assert {"h", "d", "."} == set(marks)


def test_layer_batches_of_several_layers_stand_apart_and_wrap():
    sizes = [2 * MIB] * 200
    text = plan_of(sizes, host=16 * MIB + 40 * MIB, layer_batch_size=3, slots=3).describe()
    rows = [line.strip() for line in text.splitlines() if re.fullmatch(r"  [.h ]+", line)]
    assert len(rows) > 2
    assert all(len(row) <= 80 for row in rows)
    groups = " ".join(rows).split()
    assert len("".join(groups)) == 200
    assert {len(group) for group in groups[1:-2]} == {3}
    assert "layer batches apart" in text


def test_memory_is_compared_with_the_budget_of_both_sides(streamed):
    text = streamed.describe()
    assert re.search(r"VRAM +\[s*r+w+\.*\] .* of 88 MiB: slots .*, residents .*, workload", text)
    assert re.search(r"host RAM +\[[srw.]{10}\] .* of 40 MiB: slots", text)


def test_a_plan_for_the_cpu_does_not_mention_vram():
    text = report_plan(plan_of(SIZES, FAST_CPU, host=40 * MIB))
    assert "VRAM" not in text
    assert "per_second" not in text


def test_a_plan_without_a_workload_mentions_sweeps_and_no_tokens():
    text = report_plan(plan_of(SIZES, FAST_CPU, host=40 * MIB))
    assert "weights alone" in text
    assert "every further sweep" in text
    assert "token" not in text.replace("tokens in a pass", "").partition("What it was made")[0]


def test_assumed_figures_are_marked_and_others_have_their_origin():
    figures = {
        "disk_bytes_per_second": Figure(origin=Origin.MEASURED, least=9e8, most=1.1e9),
        "mmap_bytes_per_second": Figure(origin=Origin.CACHED, age_seconds=7500.0),
        "compute": Figure(origin=Origin.LEARNT),
    }
    some = dataclasses.replace(FAST_CPU, figures=figures, overhead_seconds_per_batch=None)
    text = report_plan(plan_of(SIZES, some, host=40 * MIB))
    row = {re.split(r"  +", line.strip())[0]: line for line in text.splitlines()}
    assert row["disk, direct reads"].endswith("measured just now (900 MB/s to 1.1 GB/s)")
    assert row["disk, mapped files"].endswith("measured 2 h 5 min ago")
    assert row["copies in host RAM"].endswith("given")
    assert row["compute at 1 tokens"].endswith("learnt from this model's sweeps")
    assert row["hand-offs of a layer batch"].endswith("ASSUMED")
    assert text.count("ASSUMED") == 2  # and once in the note on it
    assert "ASSUMED" not in report_plan(plan_of(SIZES, FAST_CPU, host=40 * MIB))


def test_what_was_measured_on_a_busy_machine_is_said_beside_the_speed():
    busy = dataclasses.replace(
        FAST_CPU, figures={"compute": Figure(origin=Origin.CONTENDED, least=1e9, most=3e9)}
    )
    for hardware, expected in ((busy, True), (FAST_CPU, False)):
        plan = plan_of(SIZES, hardware, host=40 * MIB, workload=Workload())
        after_speed = plan.describe().partition("\n  speed")[2].splitlines()[1]
        assert ("measured on a BUSY machine" in after_speed) is expected
        assert bool(summarize_plan(plan)["contended"]) is expected


def test_advice_is_sorted_by_gain_and_says_where_there_is_none(streamed):
    part = report_plan(streamed).partition("What would help")[2].partition("What it was")[0]
    rows = [line for line in part.splitlines() if "x as fast" in line or "nothing" in line]
    gains = [float(found[1]) for row in rows if (found := re.search(r"([0-9.]+) x as fast", row))]
    assert len(rows) >= 4
    assert gains == sorted(gains, reverse=True)
    assert all(("nothing" in row) == (place >= len(gains)) for place, row in enumerate(rows))
    assert "a disk twice as fast" in part


def test_advice_on_a_gib_that_is_less_than_a_layer_batch_comes_with_one_on_a_whole_batch():
    sizes = [MIB, *[3 << 30] * 8, MIB]
    hardware = dataclasses.replace(FAST_GPU, compute=())
    plan = plan_of(sizes, hardware, host=10 << 30, vram=10 << 30)
    sweeps = {each.change: each.sweep_seconds for each in plan.advice}
    now = plan.prediction.decode.seconds
    assert sweeps["1 GiB more of host RAM"] == pytest.approx(now)
    assert sweeps["3 GiB (one layer batch) more of host RAM"] < 0.9 * now
    assert sweeps["3 GiB (one layer batch) more of VRAM"] < 0.9 * now


def test_the_trivial_plan_is_listed_with_how_much_longer_it_takes(streamed):
    text = report_plan(streamed)
    trivial = next(line for line in text.splitlines() if "1 (trivial)" in line)
    times = float(re.search(r"([0-9.]+) x the time", trivial)[1])
    one = next(each for each in streamed.candidates if each.name and each.layer_batch_size == 1)
    expected = one.request_seconds / streamed.prediction.request_seconds
    assert times == pytest.approx(expected, abs=0.01)
    assert text.count("<- chosen") == 1


@pytest.mark.parametrize("hardware", [CPU, GPU, FAST_CPU, FAST_GPU])
def test_the_report_fits_a_terminal_and_is_the_same_in_markdown(hardware):
    vram = 100 * MIB if hardware.device != "cpu" else None
    plan = plan_of(SIZES, hardware, host=50 * MIB, vram=vram, workload=Workload(), reader=None)
    text, markdown = report_plan(plan), report_plan(plan, markdown=True)
    assert max(map(len, text.splitlines())) <= 100
    assert len(plan.describe().splitlines()) <= 24  # one screen
    assert text.startswith(plan.describe())
    assert re.findall(r"[0-9.]+ [GMk]B/s", text) == re.findall(r"[0-9.]+ [GMk]B/s", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert len(tables) > 20
    assert max(columns) <= 10
    assert markdown.count("```") == 2


def test_the_summary_has_the_decision_with_units_in_the_keys(streamed):
    summary = json.loads(json.dumps(summarize_plan(streamed)))
    assert summary["vram_budget_bytes"] == 88 * MIB
    assert summary["host_used_bytes"] == streamed.host_memory.used_bytes
    assert summary["predicted_sweep_seconds"] == streamed.predicted_sweep_seconds
    assert summary["bottleneck"] in {"read", "transfer", "compute", "hand-offs"}
    assert summary["assumed"] == []
    residents = summary["host_resident_layer_batches"] + summary["vram_resident_layer_batches"]
    assert residents == sum(not batch.streamed for batch in streamed.batches) > 0


def test_decode_residents_are_listed_and_drawn(tmp_path):
    write_checkpoint(tmp_path, blocks=40, rows=4000)
    config = {"hidden_size": 64, "num_hidden_layers": 40, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    checkpoint = Checkpoint.open(tmp_path)
    arguments = {
        "workload": Workload(prompt_tokens=2000),
        "layer_batch_size": 1,
        "reader": "direct",
    }
    reserved = make_plan(checkpoint, FAST_GPU, **arguments).device_memory.reserved_bytes
    budget = Budget(vram=reserved + 6 * MIB, host=20 * MIB)
    plan = make_plan(checkpoint, FAST_GPU, budget=budget, **arguments)
    assert plan.decode_residents
    text = plan.describe()
    assert f"{len(plan.decode_residents)} more stay in VRAM" in text
    assert "+ in VRAM while decoding" in text
    assert Plan.from_json(plan.to_json()) == plan
