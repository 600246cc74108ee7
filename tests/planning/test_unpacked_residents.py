"""Residents of packed weights are kept unpacked as well where that is faster and there is memory for it, and the plan says so."""

import dataclasses
import json
from pathlib import Path

import pytest
from support.fp8_layers import COLUMNS, LAYERS, ROWS, fp8_layers
from support.plans import CPU

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.machine.measurement import ComputeRate, UnpackingRate
from layerstream.pipeline.planning.plan import Budget, Plan, Workload
from layerstream.pipeline.planning.planned_layers import planned_layers
from layerstream.pipeline.planning.planner import make_plan
from layerstream.pipeline.report.plan_report import report_plan, summarize_plan

PLAIN = 2 * ROWS * COLUMNS
MANY = Workload(prompt_tokens=8, new_tokens=16)
# So slow that a few tokens are worth the memory that has to be provided.
RATE = UnpackingRate(encoding="fp8", bytes_per_second=1e8)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return fp8_layers(tmp_path)


def plan_for(checkpoint, host="128MiB", **options):
    hardware = options.pop("hardware", dataclasses.replace(CPU, unpacking=(RATE,)))
    options = {"workload": MANY, "layer_batch_size": 1, "reader": "direct", **options}
    return make_plan(checkpoint, hardware, budget=Budget(host=host), **options)


def unpacked(plan):
    return [batch.index for batch in plan.batches if batch.unpacked_bytes]


def test_with_memory_to_spare_residents_are_kept_unpacked(checkpoint):
    plan = plan_for(checkpoint)
    assert unpacked(plan) == [0, 1, 2, 3]
    assert all(batch.unpacked_bytes == PLAIN for batch in plan.batches)
    assert plan.host_memory.resident_bytes == LAYERS * PLAIN + sum(
        batch.host_bytes for batch in plan.batches
    )
    packed = plan_for(checkpoint, host="45MiB")
    assert packed.prediction.decode.compute_seconds > plan.prediction.decode.compute_seconds
    # A first sweep does without, the second one has to unpack, and to be given the memory.
    assert plan.prediction.first.compute_seconds == pytest.approx(
        packed.prediction.first.compute_seconds
    )
    assert plan.prediction.second.seconds > packed.prediction.second.seconds


@pytest.mark.parametrize("mebibytes", range(36, 70, 3))
def test_as_many_as_fit_are_and_the_budget_holds(checkpoint, mebibytes):
    plan = plan_for(checkpoint, host=f"{mebibytes}MiB")
    free = plan.host_memory.budget_bytes - plan.host_memory.used_bytes
    assert free >= 0
    assert len(unpacked(plan)) == LAYERS or free < PLAIN or any(b.streamed for b in plan.batches)


def test_a_mapping_is_kept_unpacked_too_in_half_of_what_is_free_without_a_budget(checkpoint):
    free = 60 << 20
    hardware = dataclasses.replace(CPU, unpacking=(RATE,), host_available_bytes=free)
    plan = plan_for(checkpoint, None, reader="mmap", hardware=hardware)
    left = plan.host_memory.budget_bytes - plan.host_memory.used_bytes
    taken = PLAIN * len(unpacked(plan))
    assert 0 < taken <= left
    assert taken + PLAIN > left - PLAIN  # no more would fit into half


@pytest.mark.parametrize(
    "options",
    [
        {"workload": dataclasses.replace(MANY, new_tokens=2)},
        {"workload": None},
        {"kernels": "fused"},
        {
            "hardware": dataclasses.replace(
                CPU, unpacking=(RATE,), device="cuda:0", vram_free_bytes=1 << 30
            )
        },
    ],
    ids=["few tokens", "no workload", "fused", "GPU"],
)
def test_they_stay_packed_where_that_is_faster(checkpoint, options):
    assert not unpacked(plan_for(checkpoint, **options))


def test_auto_decides_for_fused_kernels_or_unpacked_residents(checkpoint):
    for rate, expected in ((1e12, []), (1e6, [0, 1, 2, 3])):
        product = (ComputeRate(tokens=1, bytes_per_second=rate),)
        hardware = dataclasses.replace(
            CPU, unpacking=(dataclasses.replace(RATE, multiplied=product),)
        )
        assert unpacked(plan_for(checkpoint, kernels="auto", hardware=hardware)) == expected


def test_the_report_and_the_map_say_so(checkpoint):
    plan = plan_for(checkpoint)
    text = report_plan(plan)
    assert "4 stay in host RAM, unpacked" in text
    assert "u stays in host RAM, unpacked" in text
    assert "4 layer batches that stay are kept unpacked as well, in 16 MiB" in text
    assert summarize_plan(plan)["unpacked_layer_batches"] == LAYERS


def test_plans_are_read_back_and_so_are_older_ones(checkpoint):
    plan = plan_for(checkpoint)
    assert Plan.from_json(plan.to_json()) == plan
    older = json.loads(plan.to_json())
    for batch in older["batches"]:
        del batch["unpacked_bytes"]
    assert not unpacked(Plan.from_json(json.dumps(older)))


def test_a_running_plan_is_changed_by_its_budget(checkpoint):
    layers = planned_layers(checkpoint, group_layers(checkpoint))
    plan = plan_for(checkpoint, layers=layers)
    less = plan_for(checkpoint, host="45MiB", layers=layers, running=plan)
    assert 0 < len(unpacked(less)) < LAYERS
    assert unpacked(plan_for(checkpoint, layers=layers, running=less)) == [0, 1, 2, 3]
