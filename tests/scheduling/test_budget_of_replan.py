"""Budgets of plans that are made anew: that of the last one, or a smaller one than all weights need."""

import asyncio
from pathlib import Path

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import save_model

from layerstream.pipeline import Budget, PlanError, StreamedModel, Workload


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


def test_a_plan_with_everything_resident_can_be_planned_smaller_and_larger_again(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    folder = save_model(tmp_path / "model", "llama", **sizes)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt, options = torch.arange(5, 12)[None], {"max_new_tokens": 40, "do_sample": False}
    expected = reference.generate(input_ids=prompt, **options)

    async def scenario() -> None:
        async with StreamedModel.open(
            folder,
            device="cpu",
            reader="direct",
            layer_batch_size=1,
            budget=Budget(host=2 << 30),
            workload=Workload(prompt_tokens=8, new_tokens=40),
            measure=False,
        ) as model:
            all_bytes = model.plan.host_memory.resident_bytes
            assert not any(batch.streamed for batch in model.plan.batches)
            request = asyncio.create_task(model.generate(input_ids=prompt, **options))
            small = model.plan.host_memory.reserved_bytes + all_bytes // 2
            plan = await model.replan(budget=Budget(host=small))
            assert plan is model.plan
            assert plan.host_memory.taken_bytes <= small
            assert any(batch.streamed for batch in plan.batches)
            assert (await request).equal(expected)
            assert (await model.generate(input_ids=prompt, **options)).equal(expected)
            await model.replan(budget=Budget(host=2 << 30))
            assert (await model.generate(input_ids=prompt, **options)).equal(expected)

    with nothing_left_behind():
        run(scenario())


@pytest.mark.parametrize("slots", [None, 3])
def test_a_budget_for_fewer_slots_than_there_are_makes_other_slots_unless_they_were_asked_for(
    tmp_path: Path, slots: int | None
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    folder = save_model(tmp_path / "model", "llama", **sizes)
    prompt, greedy = torch.arange(5, 12)[None], {"max_new_tokens": 40, "do_sample": False}

    async def scenario() -> None:
        options = {"layer_batch_size": 2, "slots": slots, "measure": False, "reader": "direct"}
        workload = Workload(prompt_tokens=8, new_tokens=40)

        def opened(budget: Budget) -> StreamedModel:
            return StreamedModel.open(
                folder, device="cpu", budget=budget, workload=workload, **options
            )

        async with opened(Budget(host="1GiB")) as model:
            fixed = model.plan.host_memory.reserved_bytes
            batch = max(each.host_bytes for each in model.plan.batches)
            expected = await model.generate(input_ids=prompt, **greedy)
        async with opened(Budget(host=fixed + 3 * batch + batch // 2)) as model:
            assert model.plan.host_slots > 1
            request = asyncio.create_task(model.generate(input_ids=prompt, **greedy))
            small = Budget(host=fixed + batch + batch // 2)
            if slots is None:
                plan = await model.replan(budget=small)
                assert (plan.host_slots, plan.layer_batch_size) == (1, 2)
                assert plan.host_memory.taken_bytes <= small.host
                assert (
                    model._running.stream.pipeline._resources.arenas[0].capacity_bytes <= small.host
                )
            else:
                with pytest.raises(
                    PlanError, match=r"layer batch of 2 blocks .* anew with smaller"
                ):
                    await model.replan(budget=small)
            assert (await request).equal(expected)
            with pytest.raises(PlanError, match=r"layer batch of 2 blocks .* anew with smaller"):
                await model.replan(budget=Budget(host=fixed + batch // 2))
            assert (await model.generate(input_ids=prompt, **greedy)).equal(expected)

    with nothing_left_behind():
        run(scenario())
