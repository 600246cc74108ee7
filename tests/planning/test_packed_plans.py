"""Plans for packed weights: bytes as stored, unpacking priced by encoding, tiles counted."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.fp8_layers import COLUMNS, LAYERS, ROWS, fp8_layers
from support.plans import CPU

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.machine.measurement import ComputeRate, Origin, UnpackingRate
from layerstream.pipeline.planning.plan import Budget, Plan, Workload
from layerstream.pipeline.planning.planned_layer import PlannedLayer
from layerstream.pipeline.planning.planned_layers import planned_layers
from layerstream.pipeline.planning.planner import make_plan
from layerstream.pipeline.report.plan_report import report_plan


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return fp8_layers(tmp_path)


def plan_at(
    checkpoint: Checkpoint, rate: float | None, *, host: str | None = "31MiB", **options: Any
) -> Plan:
    """A plan; the budget is too small to keep anything unpacked, unless another is given."""
    unpacking = () if rate is None else (UnpackingRate(encoding="fp8", bytes_per_second=rate),)
    hardware = dataclasses.replace(CPU, unpacking=unpacking)
    workload = options.pop("workload", Workload(prompt_tokens=8, new_tokens=8))
    return make_plan(checkpoint, hardware, budget=Budget(host=host), workload=workload, **options)


def test_what_is_read_is_packed_and_what_is_computed_with_is_not(checkpoint: Checkpoint) -> None:
    weight = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    scale = checkpoint.tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    assert packed_form(checkpoint, weight) == ("fp8", 2 * ROWS * COLUMNS)
    form = packed_form(checkpoint, scale)
    assert form is not None
    assert form.plain_bytes == 0
    plan = plan_at(checkpoint, 1e9)
    assert sum(batch.tensor_bytes for batch in plan.batches) == checkpoint.total_bytes


def test_unpacking_takes_its_time_in_every_pass(checkpoint: Checkpoint) -> None:
    slow, fast = plan_at(checkpoint, 1e8), plan_at(checkpoint, 1e12)
    seconds = (
        slow.prediction.decode.compute_seconds - fast.prediction.decode.compute_seconds,
        slow.prediction.prefill.compute_seconds - fast.prediction.prefill.compute_seconds,
    )
    assert seconds == pytest.approx((checkpoint.total_bytes / 1e8,) * 2, rel=0.01)


def test_the_python_of_a_packed_matrix_takes_its_time(checkpoint: Checkpoint) -> None:
    seconds = []
    for rate in (1e3, 1e12):
        hardware = dataclasses.replace(CPU, blocks_per_second=rate)
        plan = make_plan(
            checkpoint,
            hardware,
            budget=Budget(host="40MiB"),
            workload=Workload(prompt_tokens=8, new_tokens=8),
        )
        seconds.append(plan.prediction.decode.compute_seconds)
    # A block of transformers takes twice as long as a plain one, and its one matrix 0.17 of a plain block.
    assert seconds[0] - seconds[1] == pytest.approx(LAYERS * 2.17e-3)


def test_an_unknown_rate_is_assumed_and_said_to_be(checkpoint: Checkpoint) -> None:
    given = {each.name: each for each in plan_at(checkpoint, 1e9).inputs}["unpacking fp8"]
    assert (given.value, given.origin) == (1e9, Origin.GIVEN)
    assumed = {each.name: each for each in plan_at(checkpoint, None).inputs}["unpacking fp8"]
    assert assumed.origin is Origin.ASSUMED


@pytest.mark.parametrize(
    ("kernels", "multiplied", "expected"),
    [
        ("exact", 1e12, 0),
        ("fused", 1e6, 4),
        ("fused", None, 4),
        ("auto", 1e12, 4),
        ("auto", 1e6, 0),
        ("auto", None, 0),
    ],
)
def test_auto_takes_the_kernels_that_are_measured_to_be_faster(
    checkpoint: Checkpoint, kernels: str, multiplied: float | None, expected: int
) -> None:
    products = (
        ()
        if multiplied is None
        else (
            ComputeRate(tokens=1, bytes_per_second=multiplied),
            ComputeRate(tokens=4, bytes_per_second=multiplied / 2),
        )
    )
    rate = UnpackingRate(encoding="fp8", bytes_per_second=1e9, multiplied=products)
    plan = make_plan(
        checkpoint,
        dataclasses.replace(CPU, unpacking=(rate,)),
        budget=Budget(host="64MiB"),
        workload=Workload(prompt_tokens=8, new_tokens=8),
        kernels=kernels,
    )
    assert plan.fused_tokens == expected
    assert ("fused kernels" in report_plan(plan)) is bool(expected)
    assert Plan.from_json(plan.to_json()).fused_tokens == expected
    if kernels == "fused" and multiplied is not None:
        packed = sum(i.nbytes for i in checkpoint.tensors.values())
        assert plan.prediction.decode.compute_seconds > packed / multiplied


def test_the_memory_of_tiles_is_reserved(checkpoint: Checkpoint) -> None:
    plan = plan_at(checkpoint, 1e9)
    tile = ROWS * COLUMNS * 2  # less than a tile may have, so it is all of a matrix
    assert max(batch.scratch_bytes for batch in plan.batches) == tile
    assert plan.host_memory.reserved_bytes >= tile


def test_the_report_says_what_stays_packed(checkpoint: Checkpoint) -> None:
    text = report_plan(plan_at(checkpoint, 1e9))
    assert "weights stay packed (fp8) and are unpacked tile by tile" in text
    assert "unpacking fp8" in text


def test_plain_weights_are_not_said_to_be_packed(tmp_path: Path) -> None:
    save_file({"model.layers.0.up.weight": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert packed_form(checkpoint, checkpoint.tensors["model.layers.0.up.weight"]) is None
    assert "packed" not in report_plan(plan_at(checkpoint, 1e9))


def test_several_requests_unpack_once_if_that_takes_little_of_the_budget(
    checkpoint: Checkpoint,
) -> None:
    layers = tuple(
        dataclasses.replace(layer, once_bytes=6 << 20)
        for layer in planned_layers(checkpoint, group_layers(checkpoint))
    )

    head = dataclasses.replace(layers[-1], once_bytes=7 << 20)

    def once(sequences: int, budget: str, found: tuple[PlannedLayer, ...] = layers) -> int:
        workload = Workload(batch_size=sequences, prompt_tokens=8, new_tokens=8)
        plan = make_plan(
            checkpoint, CPU, budget=Budget(host=budget), workload=workload, layers=found
        )
        assert plan.host_memory.reserved_bytes >= plan.unpacked_once_bytes
        return plan.unpacked_once_bytes

    assert once(1, "64MiB") == 0
    assert once(2, "64MiB") == 6 << 20
    assert once(2, "40MiB") == 0
    assert once(2, "64MiB", (*layers[:-1], head)) == 7 << 20  # the largest that fits the share
    assert once(2, "50MiB", (*layers[:-1], head)) == 6 << 20
