"""A device that is out of memory in mid-run: fewer layers stay in its memory, the pass is made once more, with equal bits."""

import asyncio
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from support.gpus import StandIn
from support.leaks import nothing_left_behind, our_tasks
from support.loop import run, turns
from support.models import CACHE, inputs_for, save_model
from support.out_of_memory import OutOfMemory, opened
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from layerstream.pipeline import DeviceError

LAYERS = 6
SIZE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": LAYERS}
GREEDY = {"do_sample": False, "max_new_tokens": 5}
IDS = inputs_for("llama")["input_ids"]
# In the pass of a prompt or of a step: the first layer, one in the middle, the last.
MOMENTS = {"first batch": 0, "middle": 3, "last batch": LAYERS - 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama whose blocks are large compared with what else is in a budget."""
    return save_model(tmp_path_factory.mktemp("oom") / "model", "llama", **SIZE)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    return StandIn(monkeypatch)


def residents(model):
    return sum(batch.device_resident for batch in model.plan.batches)


def reference(folder, **settings):
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, **settings).generate(IDS, **GREEDY)


@pytest.mark.parametrize("step", [0, 2], ids=["prompt", "step"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pass_without_memory_is_made_again_with_a_smaller_plan_and_equal_tokens(  # noqa: PLR0917
    folder, gpu, monkeypatch, caplog, moment, step
):
    caplog.set_level(logging.WARNING, "layerstream")

    async def main():
        async with await opened(folder) as model:
            before, free = model.plan, gpu.opened.free_bytes()
            assert 0 < residents(model) < len(before.batches)
            at = step * LAYERS + MOMENTS[moment]
            fault = OutOfMemory(monkeypatch, LlamaMLP, "forward", at=at)
            tokens = await model.generate(IDS, **GREEDY)
            assert fault.raised == 1
            assert gpu.opened.free_bytes() > free
            after = model.plan
            assert after.device_memory.taken_bytes < before.device_memory.taken_bytes
            assert torch.equal(await model.generate(IDS, **GREEDY), tokens)
            assert after is model.plan
        return tokens

    with nothing_left_behind():
        tokens = run(main())
    assert torch.equal(tokens, reference(folder))
    (warning,) = [each.getMessage() for each in caplog.records if "out of memory" in each.msg]
    assert "Tried to allocate 2.00 MiB" in warning
    assert "More" not in warning
    assert "instead of" in warning


def test_with_all_layers_resident_the_pipeline_gets_slots(folder, gpu, monkeypatch):
    async def main():
        async with await opened(folder, layers=20) as model:
            assert residents(model) == len(model.plan.batches)
            free = gpu.opened.free_bytes()
            OutOfMemory(monkeypatch, LlamaMLP, "forward", at=LAYERS)
            tokens = await model.generate(IDS, **GREEDY)
            assert residents(model) < len(model.plan.batches)
            assert gpu.opened.free_bytes() > free
        return tokens

    with nothing_left_behind():
        assert torch.equal(run(main()), reference(folder))


def test_without_memory_for_the_second_time_the_error_has_the_figures_and_the_model_goes_on(
    folder, monkeypatch
):
    async def main():
        async with await opened(folder) as model:
            OutOfMemory(monkeypatch, LlamaMLP, "forward", at=2, times=2)
            with pytest.raises(DeviceError) as caught:
                await model.generate(IDS, **GREEDY)
            message = str(caught.value)
            del caught
            tokens = await model.generate(IDS, **GREEDY)
        return message, tokens

    with nothing_left_behind():
        message, tokens = run(main())
    assert "Tried to allocate 2.00 MiB" in message
    for figure in ("budget of", "for layers", "for its workload", "are free now", "tried again"):
        assert figure in message
    assert torch.equal(tokens, reference(folder))


def test_where_no_plan_is_smaller_the_error_says_so_at_once(folder, monkeypatch):
    async def main():
        async with await opened(folder, layers=0) as model:
            fault = OutOfMemory(monkeypatch, LlamaMLP, "forward", at=0, times=10)
            for _ in range(LAYERS):  # the smallest plan is reached, by halves or at once
                with pytest.raises(DeviceError) as caught:
                    await model.forward(IDS)
            message, raised = str(caught.value), fault.raised
            del caught
            fault.raised = 10
            assert (await model.forward(IDS)).logits.isfinite().all()
        return message, raised

    with nothing_left_behind():
        message, raised = run(main())
    assert "no smaller plan can be run" in message
    assert "budget of" in message
    assert raised < 10


def test_requests_beside_it_finish_with_equal_tokens(folder, monkeypatch):
    async def main():
        async with await opened(folder) as model:
            OutOfMemory(monkeypatch, LlamaMLP, "forward", at=3 * LAYERS)
            return await asyncio.gather(*(model.generate(IDS, **GREEDY) for _ in range(3)))

    expected = reference(folder)
    with nothing_left_behind():
        assert all(torch.equal(tokens, expected) for tokens in run(main()))


def test_a_cache_that_the_caller_brings_is_as_it_was_and_the_logits_are_equal(folder, monkeypatch):
    async def main():
        async with await opened(folder) as model:
            first = await model.forward(IDS[:, :4])
            OutOfMemory(monkeypatch, LlamaMLP, "forward", at=4)
            second = await model.forward(IDS[:, 4:], **{CACHE: first[CACHE]})
            another = await model.forward(IDS[:, :4])
            again = await model.forward(IDS[:, 4:], **{CACHE: another[CACHE]})
            assert second[CACHE].get_seq_length() == IDS.shape[1]
        return second, again

    with nothing_left_behind():
        second, again = run(main())
    assert torch.equal(second.logits, again.logits)


def test_a_cache_that_cannot_be_put_back_is_not_written_twice(folder, monkeypatch):
    async def main():
        async with await opened(folder) as model:
            cache = transformers.StaticCache(config=model.module.config, max_cache_len=16)
            await model.forward(IDS[:, :4], **{CACHE: cache})
            fault = OutOfMemory(monkeypatch, LlamaMLP, "forward", at=3)
            with pytest.raises(DeviceError, match=r"KV cache.* cannot be put back") as caught:
                await model.forward(IDS[:, 4:], **{CACHE: cache})
            assert "budget of" in str(caught.value)
            del caught
            assert fault.calls == 4
            assert (await model.forward(IDS)).logits.isfinite().all()

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("window", [32, 4])
def test_a_sliding_window_is_put_back_as_long_as_no_token_has_left_it(
    tmp_path, monkeypatch, window
):
    folder = save_model(tmp_path / "model", "gemma3", sliding_window=window, **SIZE)

    async def main():
        async with await opened(folder) as model:
            expected = await model.generate(IDS, **GREEDY)
            OutOfMemory(monkeypatch, Gemma3MLP, "forward", at=2 * LAYERS + 3)
            if window > IDS.shape[1] + 5:
                assert torch.equal(await model.generate(IDS, **GREEDY), expected)
            else:
                with pytest.raises(DeviceError, match="cannot be put back"):
                    await model.generate(IDS, **GREEDY)
            assert torch.equal(await model.generate(IDS, **GREEDY), expected)

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("at", [0, 2, 9], ids=["first batch", "middle", "wrap-around"])
def test_a_copy_without_memory_ends_no_request(folder, gpu, monkeypatch, caplog, at):
    caplog.set_level(logging.WARNING, "layerstream")

    async def main():
        async with await opened(folder) as model:
            if at:
                await model.forward(IDS)  # residents are loaded: only those that stream are copied
            before = model.plan
            fault = OutOfMemory(monkeypatch, gpu.opened, "copy", at=2 * at)
            tokens = await asyncio.gather(*(model.generate(IDS, **GREEDY) for _ in range(2)))
            assert fault.raised == 1
            assert model.failure is None
            assert model.stats().reopened == 1
            assert model.plan.device_memory.taken_bytes < before.device_memory.taken_bytes
        return tokens

    expected = reference(folder)
    with nothing_left_behind():
        assert all(torch.equal(tokens, expected) for tokens in run(main()))
    assert any("is out of memory" in each.getMessage() for each in caplog.records)


def test_copies_without_memory_for_the_second_time_fail_the_requests_with_the_figures(
    folder, gpu, monkeypatch
):
    async def main():
        async with await opened(folder) as model:
            fault = OutOfMemory(monkeypatch, gpu.opened, "copy", at=6, times=1000)
            with pytest.raises(DeviceError) as caught:
                await model.generate(IDS, **GREEDY)
            message = str(caught.value)
            del caught
            fault.raised = 1000
            await model.reopen()
            tokens = await model.generate(IDS, **GREEDY)
        return message, tokens

    with nothing_left_behind():
        message, tokens = run(main())
    assert "out of memory" in message
    assert "budget of" in message
    assert torch.equal(tokens, reference(folder))


def test_residents_for_which_there_is_no_memory_are_streamed(folder, gpu, monkeypatch):
    """Slots are taken when a model is opened; in mid-run, memory is allocated for residents of a new plan only."""

    async def main():
        async with await opened(folder, layers=1) as model:
            large = replace(model.plan.budget, vram=model.plan.device_memory.budget_bytes * 3)
            fault = OutOfMemory(monkeypatch, torch, "full", at=0, times=1)

            def device_memory(nbytes, works=gpu.opened.device_memory):
                try:
                    return works(nbytes)
                except torch.OutOfMemoryError as error:  # as CudaDevice does
                    raise DeviceError("no memory") from error

            monkeypatch.setattr(gpu.opened, "device_memory", device_memory)
            with pytest.raises(DeviceError, match="no memory"):
                await model.replan(budget=large)
            assert fault.raised == 1
            return await model.generate(IDS, **GREEDY)

    with nothing_left_behind():
        assert torch.equal(run(main()), reference(folder))


def test_layers_in_host_ram_leave_no_host_slots_and_more_vram_is_no_reason_to_fail(folder):
    async def main():
        async with await opened(folder, layers=0, host="64MiB") as model:
            plan = model.plan
            assert plan.host_arena_bytes == 0
            large = replace(plan.budget, vram=3 * plan.device_memory.budget_bytes)
            assert (await model.replan(budget=large)).budget == large
            return await model.generate(IDS, **GREEDY)

    with nothing_left_behind():
        assert torch.equal(run(main()), reference(folder))


def test_closing_while_room_is_made_fails_the_request_and_leaves_nothing(folder, monkeypatch):
    async def main():
        async with await opened(folder) as model:
            running = model._running
            began, goes_on = asyncio.Event(), asyncio.Event()
            make_room = running.out_of_memory.make_room

            async def slowly(nbytes):
                began.set()
                await goes_on.wait()
                return await make_room(nbytes)

            running.out_of_memory.make_room = slowly
            OutOfMemory(monkeypatch, LlamaMLP, "forward", at=3)
            request = asyncio.create_task(model.generate(IDS, **GREEDY))
            await began.wait()
            closing = asyncio.create_task(model.aclose())
            await turns()
            goes_on.set()
            await closing
            with pytest.raises(Exception, match=r"closed|not open"):
                await request
        assert our_tasks() == []

    with nothing_left_behind():
        run(main())
