"""The budget of a plan that is made anew is that of the last one."""

from pathlib import Path

import pytest
from support.loop import run
from support.models import save_model

from layerstream.pipeline import Budget, StreamedModel


@pytest.mark.parametrize("budget", [None, Budget(host="60%")], ids=["default", "a share"])
def test_the_budget_of_plans_made_anew_does_not_grow(tmp_path: Path, budget: Budget | None) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6)

    async def scenario() -> None:
        async with StreamedModel.open(
            folder, device="cpu", reader="direct", budget=budget, measure=False
        ) as model:
            first = model.plan.host_memory.budget_bytes
            for _ in range(3):  # what was planned is not touched yet, so it is still free
                plan = await model.replan()
                assert plan.host_memory.budget_bytes == first

    run(scenario())
