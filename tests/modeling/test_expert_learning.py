"""What sweeps have shown of how tokens choose experts is used by the next plan, and shown as learnt."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loop import run
from support.models import save_model
from support.streaming import SMALL

from layerstream.pipeline import Budget, Plan, StreamedModel
from layerstream.pipeline.planning.expert_cells import ExpertCells, cells_by_use
from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor
from layerstream.stages.batch import Extent
from layerstream.stages.experts.usage import ExpertUsage

PROMPT = torch.arange(3, 15).unsqueeze(0)


def test_a_new_plan_knows_what_was_learnt(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen3-moe", num_experts=8)

    async def main() -> None:
        async with StreamedModel.open(
            folder, device="cpu", workload=SMALL, reader="direct", budget=Budget(host="50MiB")
        ) as model:
            before = model.plan
            assert all(each.usage is None for each in before.experts)
            assert "if routing is even (ASSUMED)" in before.describe()
            await model.generate(input_ids=PROMPT, max_new_tokens=30, do_sample=True)
            plan = await model.replan()
            assert plan.expert_bytes_per_step == sum(e.missed_bytes(1) for e in plan.experts)
            assert sum(e.cells for e in plan.experts) == sum(e.cells for e in before.experts)
            for each in plan.experts:
                assert each.usage is not None
                assert each.distinct(1) == pytest.approx(each.per_token)
                assert each.usage.hit_shares[-1] == pytest.approx(1)
            assert "as past sweeps have shown" in plan.describe()
            assert "ASSUMED)" not in plan.describe().split("experts")[1].split("\n")[0]
            assert Plan.from_json(plan.to_json()) == plan
            await model.generate(input_ids=PROMPT, max_new_tokens=4, do_sample=True)
            learnt = model.hardware
        async with StreamedModel.open(
            folder, device="cpu", workload=SMALL, reader="direct", hardware=learnt
        ) as model:
            assert all(each.usage is not None for each in model.plan.experts)

    run(main())


def usage(shares: list[float]) -> ExpertUsage:
    return ExpertUsage(tokens=(1.0,), distinct=(2.0,), hit_shares=tuple(shares))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.data())
def test_cells_go_where_they_hit_and_stay_as_many(own: list[int], data: st.DataObject) -> None:
    tensor = ExpertTensor(
        name="w",
        dtype="uint8",
        shape=(64,),
        nbytes=64,
        extents=((Extent(file=0, offset=0, nbytes=64),),) * 8,
    )
    first = ExpertSource(module="0", experts=8, per_token=2, tensors=(tensor,))
    sources = [replace(first, module=str(number)) for number in range(len(own))]
    curves = {
        source.module: usage(
            [0.0, *sorted(data.draw(st.lists(st.floats(0, 1), min_size=8, max_size=8)))]
        )
        for source in sources
    }
    given_cells = ExpertCells(own=tuple(own), shared=2)
    found = cells_by_use(sources, given_cells, curves)
    assert sum(found.own) == sum(own)
    assert all(0 <= cells <= 8 for cells in found.own)
    assert cells_by_use(sources, given_cells, {}) is given_cells


def test_a_layer_that_uses_few_experts_gets_few_cells() -> None:
    tensor = ExpertTensor(
        name="w",
        dtype="uint8",
        shape=(64,),
        nbytes=64,
        extents=((Extent(file=0, offset=0, nbytes=64),),) * 8,
    )
    sources = [
        ExpertSource(module=name, experts=8, per_token=2, tensors=(tensor,)) for name in "ab"
    ]
    curves = {
        "a": usage([0, 0.5, 1, 1, 1, 1, 1, 1, 1]),
        "b": usage([number / 8 for number in range(9)]),
    }
    found = cells_by_use(sources, ExpertCells(own=(4, 4)), curves)
    assert found.own == (2, 6)
