"""Cells of experts in plans: never more than the budget, and never fewer for more of it."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import CPU
from support.loop import run
from support.models import save_model
from support.streaming import SMALL

from layerstream.pipeline import Budget, Checkpoint, Plan, PlanError, StreamedModel, make_plan
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.planning.expert_cells import (
    ExpertCells,
    cells_bytes,
    fewest_cells,
    filled_cells,
)
from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor, lay_out_experts
from layerstream.pipeline.planning.overheads import overheads
from layerstream.pipeline.planning.planned_layers import planned_layers
from layerstream.stages.batch import Extent


@st.composite
def sources(draw: st.DrawFn) -> ExpertSource:
    experts = draw(st.integers(1, 12))
    return ExpertSource(
        module="experts",
        experts=experts,
        per_token=draw(st.integers(0, experts)),
        tensors=tuple(
            ExpertTensor(
                name=str(number),
                dtype="uint8",
                shape=(nbytes,),
                nbytes=nbytes,
                extents=((Extent(file=0, offset=0, nbytes=nbytes),),) * experts,
                shift=draw(st.sampled_from([0, 8, 63])),
            )
            for number, nbytes in enumerate(
                draw(st.lists(st.integers(1, 5000), min_size=1, max_size=4))
            )
        ),
    )


@given(
    st.lists(sources(), min_size=1, max_size=6),
    st.lists(st.integers(0, 400_000), min_size=2, max_size=6).map(sorted),
)
def test_cells_take_what_is_free_and_never_more(drawn: list[ExpertSource], free: list[int]) -> None:
    fewest = fewest_cells(drawn)
    filled = [filled_cells(drawn, fewest, free_bytes=each) for each in free]
    for each, cells in zip(free, filled, strict=True):
        assert cells_bytes(drawn, cells) <= cells_bytes(drawn, fewest) + each
        for least, count, source in zip(fewest.own, cells.own, drawn, strict=True):
            assert least <= count <= source.experts
            experts = lay_out_experts(source, layer="", cells=count)
            assert experts.cell_bytes == source.cell_bytes
            assert experts.expert_bytes == source.expert_bytes
            ends = [view.offset + view.nbytes for view in experts.tensors]
            assert ends[-1] <= experts.cell_bytes
            starts = [view.offset for view in experts.tensors[1:]]
            assert all(end <= start for end, start in zip(ends, starts, strict=False))
        of_token = [min(source.per_token, source.experts) for source in drawn]
        if cells.shared > fewest.shared:  # a prompt's experts pass through what a token leaves
            assert all(own >= most for own, most in zip(cells.own, of_token, strict=True))
    for less, more in pairwise(filled):
        assert all(a <= b for a, b in zip(less.own, more.own, strict=True))
        assert less.shared <= more.shared or not more.shared


def test_no_experts_take_no_cells() -> None:
    assert fewest_cells([]) == ExpertCells()
    assert cells_bytes([], ExpertCells()) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, "qwen3-moe", num_experts=16, num_hidden_layers=6)


@cache
def opened(folder: Path) -> tuple[Checkpoint, object]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, planned_layers(checkpoint, group_layers(checkpoint), experts_on_demand=True)


def plan_of(folder: Path, host: int) -> Plan | None:
    checkpoint, layers = opened(folder)
    try:
        return make_plan(
            checkpoint,
            CPU,
            budget=Budget(host=host),
            workload=SMALL,
            layers=layers,
            reader="direct",
        )
    except PlanError:
        return None


@cache
def fewest_bytes(folder: Path) -> int:
    """The least budget that a plan exists for."""
    low, high = 0, 1 << 26
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if plan_of(folder, middle) else (middle + 1, high)
    return low


def bytes_per_token(plan: Plan) -> float:
    trunk = sum(batch.read_bytes for batch in plan.while_decoding().batches if batch.streamed)
    return trunk + plan.expert_bytes_per_step


def leaves_room(folder: Path, plan: Plan) -> bool:
    checkpoint, layers = opened(folder)
    modules = sum(len(layer.tensors) for layer in layers)
    overhead = overheads(checkpoint.config, modules=modules, rows=SMALL.prompt_tokens)
    spare = plan.host_memory.budget_bytes - plan.host_memory.used_bytes
    return spare >= overhead.of(SMALL.batch_size)


def kept(plan: Plan) -> int:
    return sum(each.cells for each in plan.experts)


@settings(max_examples=12)
@given(data=st.data())
def test_a_plan_keeps_to_its_budget_and_to_its_text(model: Path, data: st.DataObject) -> None:
    fewest = fewest_bytes(model)
    budgets = data.draw(st.lists(st.integers(0, 1 << 20), min_size=2, max_size=4).map(sorted))
    plans = [plan_of(model, fewest + each) for each in budgets]
    for budget, plan in zip(budgets, plans, strict=True):
        assert plan is not None
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.host_memory.used_bytes <= fewest + budget
        largest = max(each.cell_bytes for each in plan.experts)
        own = sum(each.cells * each.cell_bytes for each in plan.experts)
        assert own + plan.shared_expert_cells * largest < plan.host_memory.expert_bytes
        assert all(0 <= each.cells <= each.experts for each in plan.experts)
        # Those that a layer does not keep need cells of all layers to pass through.
        whole = all(each.cells == each.experts for each in plan.experts)
        assert whole or plan.shared_expert_cells >= 2
    for less, more in pairwise(plans):
        assert less is not None
        assert more is not None
        # The smallest budgets leave nothing for the overhead of requests; one that does may be slower for it.
        if leaves_room(model, less) or not leaves_room(model, more):
            assert more.prediction.request_seconds <= less.prediction.request_seconds * 1.01
        # Of a model as small as this, larger layer batches or more slots may be worth more than cells.
        if (less.layer_batch_size, less.host_slots) == (more.layer_batch_size, more.host_slots):
            assert kept(less) <= kept(more)
            assert bytes_per_token(more) <= bytes_per_token(less)


def test_a_budget_below_two_experts_is_refused_with_need_and_remedy(model: Path) -> None:
    checkpoint, layers = opened(model)
    least = fewest_bytes(model)
    with pytest.raises(
        PlanError, match=r"and 2 experts, which take .* are needed .* raise the budget"
    ):
        make_plan(
            checkpoint,
            CPU,
            budget=Budget(host=least - 1),
            workload=SMALL,
            layers=layers,
            reader="direct",
        )


def test_a_plan_from_names_alone_has_the_same_experts(model: Path) -> None:
    async def main() -> Plan:
        async with StreamedModel.open(
            model, device="cpu", workload=SMALL, budget=Budget(host="1GiB"), reader="direct"
        ) as streamed:
            return streamed.plan

    def facts(plan: Plan | None) -> list[tuple[object, ...]]:
        assert plan is not None
        return [
            (e.module, e.experts, e.per_token, e.cells, e.cell_bytes, e.expert_bytes)
            for e in plan.experts
        ]

    assert facts(plan_of(model, 1 << 30)) == facts(run(main()))
