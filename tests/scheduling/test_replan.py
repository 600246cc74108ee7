"""A running model that switches to a new plan, and residents that replace a prompt's activations."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import save_model

from layerstream.pipeline import (
    AdmissionError,
    Budget,
    ClosedError,
    DeviceError,
    Plan,
    PlanError,
    StreamedModel,
    Workload,
)
from layerstream.pipeline.machine.measurement import Origin
from layerstream.pipeline.planning.replan import learn
from layerstream.pipeline.scheduling.pass_state import PassPhase
from layerstream.stages.compute import Sweep

MIB = 1 << 20
# Long enough for the activations of a prompt to outweigh a block; short prompts fit many times over.
LONG = Workload(prompt_tokens=2048, new_tokens=16)
GREEDY: dict[str, Any] = {"do_sample": False}
PROMPT = torch.arange(5, 29)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose blocks are megabytes."""
    path: Path = save_model(
        tmp_path_factory.mktemp("replan") / "model",
        "llama",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        max_position_embeddings=4096,
    )
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens: torch.Tensor = reference.generate(input_ids=PROMPT, max_new_tokens=12, **GREEDY)
    return tokens


def model_with(folder: Path, *, host: int, workload: Workload = LONG) -> StreamedModel:
    return StreamedModel.open(
        folder,
        device="cpu",
        reader="direct",
        layer_batch_size=1,
        budget=Budget(host=host),
        workload=workload,
    )


async def smallest_host_bytes(folder: Path, workload: Workload = LONG) -> int:
    """The host memory of a plan without memory for residents."""
    async with model_with(folder, host=2 << 30, workload=workload) as model:
        plan = model.plan
        largest = max(batch.host_bytes for batch in plan.batches)
        return plan.host_memory.reserved_bytes + 3 * largest


def test_while_decoding_the_memory_of_a_prompt_holds_layers_and_they_are_not_read(
    folder: Path, expected: torch.Tensor
) -> None:
    async def scenario() -> None:
        # Code that is loaded only once counts only in the first model's budget.
        await smallest_host_bytes(folder)
        with nothing_left_behind():
            model = await model_with(folder, host=await smallest_host_bytes(folder)).__aenter__()
            try:
                plan = model.plan
                assert plan.decode_residents
                assert plan.while_decoding().disk_bytes_per_sweep < plan.disk_bytes_per_sweep
                ids = await model.generate(input_ids=PROMPT, max_new_tokens=12, **GREEDY)
                assert torch.equal(ids, expected)
                before = model.timings().stages[0].bytes
                again = await model.generate(input_ids=PROMPT, max_new_tokens=12, **GREEDY)
                assert torch.equal(again, expected)
                read = model.timings().stages[0].bytes - before
            finally:
                await model.aclose()
        assert read < 12 * plan.disk_bytes_per_sweep

    run(scenario(), seconds=100)


def test_a_prompt_gets_the_memory_back_before_it_is_processed(folder: Path) -> None:
    long = torch.arange(2048)[None] % 90 + 5

    async def scenario() -> None:
        async with model_with(folder, host=await smallest_host_bytes(folder)) as model:
            await model.generate(input_ids=PROMPT, max_new_tokens=6, **GREEDY)
            assert model._running.stream.pipeline.plan is not model.plan
            await model.generate(input_ids=long, max_new_tokens=1, **GREEDY)
            assert model._running.stream.pipeline.plan is model.plan

    run(scenario(), seconds=100)


def test_residents_that_the_system_refuses_are_asked_for_once_and_named(
    folder: Path, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> list[str]:
        async with model_with(folder, host=await smallest_host_bytes(folder) + 8 * MIB) as model:
            plan = model.plan
            assert plan.decode_residents
            assert not all(batch.streamed for batch in plan.batches)
            device, refused = model._running.scheduler.device, []

            def refuse(nbytes: int) -> Any:
                refused.append(nbytes)
                raise DeviceError("no memory")

            device.host_memory = refuse  # type: ignore[method-assign]
            for _ in range(2):
                ids = await model.generate(input_ids=PROMPT, max_new_tokens=12, **GREEDY)
                assert torch.equal(ids, expected)
            assert len(refused) == 2  # residents while decoding, then those that always stay
            return [batch.label for batch in plan.batches if not batch.streamed]

    kept = run(scenario(), seconds=100)
    decoding, always = [r.message for r in caplog.records if "are streamed" in r.message]
    assert "would stay while no prompt is processed" in decoding
    assert f"{len(kept)} of the layer batches that would stay in memory are streamed" in always
    assert kept[0] in always


@asynccontextmanager
async def adoption_delayed(model: StreamedModel) -> AsyncIterator[None]:
    """The residents of ``model`` are about to change, and do so when the block ends."""
    begun, may_continue = asyncio.Event(), asyncio.Event()
    adopt = model._running.stream.pipeline.adopt

    async def adopting(plan: Plan) -> None:
        begun.set()
        await may_continue.wait()
        await adopt(plan)

    model._running.stream.pipeline.adopt = adopting  # type: ignore[method-assign]
    try:
        await begun.wait()
        yield
    finally:
        model._running.stream.pipeline.adopt = adopt  # type: ignore[method-assign]
        may_continue.set()


def test_a_model_continues_when_all_waiting_requests_are_cancelled_while_residents_change(
    folder: Path, expected: torch.Tensor
) -> None:
    async def scenario() -> None:
        async with model_with(folder, host=await smallest_host_bytes(folder)) as model:
            options = {"input_ids": PROMPT, "max_new_tokens": 12, **GREEDY}
            task = asyncio.create_task(model.generate(**options))
            async with adoption_delayed(model):
                task.cancel()
                await asyncio.wait([task])
            assert task.cancelled()
            assert torch.equal(await model.generate(**options), expected)

    run(scenario(), seconds=100)


def test_a_prompt_that_arrives_while_residents_take_its_memory_gets_it_back_before_its_sweep(
    folder: Path,
) -> None:
    # Fits together with the short one, but not with more layers.
    long = torch.arange(1536)[None] % 90 + 5

    async def scenario() -> None:
        async with model_with(folder, host=await smallest_host_bytes(folder)) as model:
            scheduler, pipeline = model._running.scheduler, model._running.stream.pipeline
            sweep, allowed = pipeline.sweep, []

            def starting(route: Sequence[int]) -> Sweep:
                allowed.append(scheduler.residency.allows(pipeline.plan, scheduler._demands()))
                return sweep(route)

            pipeline.sweep = starting  # type: ignore[assignment, method-assign]
            short = asyncio.create_task(
                model.generate(input_ids=PROMPT, max_new_tokens=12, **GREEDY)
            )
            async with adoption_delayed(model):
                prompt = asyncio.create_task(
                    model.generate(input_ids=long, max_new_tokens=1, **GREEDY)
                )
                await scheduler._until(lambda: len(scheduler._in(PassPhase.WAITING)) == 2)
            await asyncio.gather(short, prompt)
            assert len(allowed) > 2
            assert all(allowed)

    run(scenario(), seconds=100)


def test_with_a_new_plan_a_model_continues_its_requests_and_has_measured_rates(
    folder: Path, expected: torch.Tensor
) -> None:
    short = Workload(prompt_tokens=64, new_tokens=16)

    async def scenario() -> None:
        host = await smallest_host_bytes(folder, short) + 8 * MIB
        async with model_with(folder, host=host, workload=short) as model:
            before = model.plan
            tokens: list[int] = []
            async for token in model.stream(input_ids=PROMPT, max_new_tokens=12, **GREEDY):
                tokens.append(token)
                if len(tokens) == 3:
                    larger = await model.replan(budget=Budget(host=host + 16 * MIB))
                if len(tokens) == 6:
                    smaller = await model.replan(budget=Budget(host=host))
            assert tokens == expected[0, PROMPT.shape[1] :].tolist()
            assert larger.disk_bytes_per_sweep < before.disk_bytes_per_sweep
            assert smaller.disk_bytes_per_sweep == before.disk_bytes_per_sweep
            assert smaller.host_memory.used_bytes <= host
            assert model.plan is smaller
            origins = {each.name: each.origin for each in model.plan.inputs}
            assert origins["disk_bytes_per_second"] is not Origin.GIVEN

    run(scenario(), seconds=100)


def test_a_budget_that_is_too_small_leaves_the_old_plan(folder: Path) -> None:
    async def scenario() -> None:
        model = model_with(folder, host=256 * MIB, workload=Workload(prompt_tokens=16))
        await model.__aenter__()
        old = model.plan
        with pytest.raises(PlanError, match="cannot hold"):
            await model.replan(budget=Budget(host=MIB))
        assert model.plan is old
        await model.forward(input_ids=PROMPT[:, :8])
        await model.aclose()
        with pytest.raises(ClosedError):
            await model.replan()

    run(scenario(), seconds=100)


def test_a_smaller_budget_leaves_less_for_requests_and_a_larger_one_more(folder: Path) -> None:
    async def scenario() -> None:
        workload = Workload(prompt_tokens=16)
        async with model_with(folder, host=512 * MIB, workload=workload) as model:
            for host in (128 * MIB, 256 * MIB):
                plan = await model.replan(budget=Budget(host=host))
                taken = plan.host_memory.taken_bytes
                assert model.stats().reservable_bytes <= host - taken
                with pytest.raises(AdmissionError):
                    await model.generate(input_ids=PROMPT, max_new_tokens=10**6, **GREEDY)
                assert model.stats().reservable_bytes > plan.workload_bytes
            await model.generate(input_ids=PROMPT, max_new_tokens=2, **GREEDY)

    run(scenario(), seconds=100)


def test_a_model_may_keep_its_budget_however_little_memory_is_free_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with model_with(folder, host=256 * MIB) as model:
            monkeypatch.setattr(
                "layerstream.pipeline.machine.hardware.host_available_bytes", lambda: 0
            )
            plan = await model.replan()
            assert plan.host_memory.budget_bytes == 256 * MIB
            with pytest.raises(PlanError, match="free"):
                await model.replan(budget=Budget(host=255 * MIB))

    run(scenario(), seconds=100)


def test_concurrent_replans_and_a_cancelled_one_do_not_disturb_a_request(
    folder: Path, expected: torch.Tensor
) -> None:
    async def scenario() -> None:
        async with model_with(folder, host=256 * MIB) as model:
            generating = asyncio.create_task(
                model.generate(input_ids=PROMPT, max_new_tokens=12, **GREEDY)
            )
            budgets = (Budget(host=128 * MIB), Budget(host=200 * MIB), None)
            replans = [asyncio.create_task(model.replan(budget=each)) for each in budgets]
            await asyncio.sleep(0)
            replans[0].cancel()
            _, *plans = await asyncio.gather(*replans, return_exceptions=True)
            assert torch.equal(await generating, expected)
            assert any(model.plan is plan for plan in plans)

    run(scenario(), seconds=100)


def test_closing_fails_a_replan_that_waits(folder: Path) -> None:
    async def scenario() -> None:
        model = model_with(folder, host=256 * MIB, workload=Workload(prompt_tokens=16))
        await model.__aenter__()
        waiting = asyncio.create_task(model.replan())
        await asyncio.sleep(0)
        await model.aclose()
        with pytest.raises(ClosedError):
            await waiting

    run(scenario(), seconds=100)


def test_timings_show_predictions_together_with_measurements(folder: Path) -> None:
    async def scenario() -> None:
        async with model_with(folder, host=256 * MIB) as model:
            await model.generate(input_ids=PROMPT, max_new_tokens=4, min_new_tokens=4, **GREEDY)
            forecast = model.timings().forecast
            assert forecast is not None
            assert forecast.sweeps == 4
            prediction = model.plan.prediction
            predicted = prediction.first.seconds + 3 * prediction.decode.seconds
            assert forecast.predicted.seconds == pytest.approx(predicted)
            assert forecast.measured.seconds > 0
            text = model.timings().summary()
            assert "sweep: predicted" in text
            (first, *steps) = [sweep.tokens for sweep in model.timings().latest]
            assert (first, steps) == (24, [1, 1, 1])
            learned = learn(
                model.hardware,
                model.plan,
                dataclasses.replace(model.timings()),
            )
            assert learned.host_available_bytes == model.hardware.host_available_bytes

    run(scenario(), seconds=100)
