"""Cancellation at each await of what a user may wait for, and consumers that leave after each token.

It ends in time, and the same model computes what it computed before; at the end nothing is left behind.
"""

import asyncio
import hashlib
from contextlib import suppress

import pytest
import torch
from support.leaks import nothing_left_behind, our_tasks
from support.loop import Interrupted, run, turns
from support.models import inputs_for, save_model
from support.selection import covering
from support.streaming import open_streaming

from layerstream.pipeline import Budget, LayerstreamError, ReadError
from layerstream.stages.readers.direct import DirectReader

GREEDY = {"do_sample": False, "max_new_tokens": 3}
INPUTS = inputs_for("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("cancelled") / "model", "llama", num_hidden_layers=4)


async def forward(model):
    await model.forward(**INPUTS)


async def generate(model):
    await model.generate(**INPUTS, **GREEDY)


async def stream(model):
    async for _ in model.stream(**INPUTS, **GREEDY):
        pass


async def replan_to_less(model):
    await model.replan(budget=model.plan.budget)


async def replan_to_more(model):
    await model.replan(budget=Budget(host=4 * model.plan.host_memory.budget_bytes))


async def reopen(model):
    await model.reopen()


async def break_reads(model):
    """Have a read of a layer batch fail, which ends streaming."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectReader, "read", broken)
        while model.failure is None:  # what was read ahead may serve the first
            with suppress(LayerstreamError):
                await model.forward(**INPUTS)


def broken(*_):
    raise ReadError("broken") from OSError(5, "broken")


async def verified(model):
    await model.verified()


CALLS = [forward, generate, stream, replan_to_less, replan_to_more, reopen, verified]
MOMENTS = {"first sweep": 0, "between sweeps": 1, "beside another request": 2}


def digests_of(folder):
    """The digests of its one file, as ``sha256sum`` writes them."""
    path = folder / "model.safetensors"
    sums = folder.parent / "sums"
    sums.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    return sums


async def cancelled_at(number, model, call):
    """Cancel ``call`` at its await ``number``; whether it came so far."""
    task = None
    interrupted = Interrupted(call, number, lambda: asyncio.get_running_loop().call_soon(cancel))

    def cancel():
        task.cancel()

    task = asyncio.create_task(interrupted(model))
    await asyncio.wait([task], timeout=30)
    assert task.done(), f"{call.__name__} did not end when it was cancelled at await {number}"
    if not task.cancelled():
        task.result()  # it had nothing more to wait for
    return interrupted.reached


@covering(call=CALLS, moment=MOMENTS)
def test_after_a_cancellation_at_any_await_the_model_goes_on(folder, extended, call, moment):
    options = {"reader": "direct", "verify": digests_of(folder)}

    async def main():
        expected = None
        number, step = 0, 1 if extended else 3
        while True:
            prepared = await open_streaming(folder, **options)
            async with prepared as model:
                if moment:
                    await model.generate(**INPUTS, **GREEDY)
                other = None
                if moment == 2:
                    other = asyncio.create_task(model.generate(**INPUTS, **GREEDY))
                    await turns(number % 7)
                if call is reopen:
                    await break_reads(model)
                reached = await cancelled_at(number, model, call)
                if model.failure is not None:
                    await model.reopen()
                tokens = await model.generate(**INPUTS, **GREEDY)
                expected = tokens if expected is None else expected
                assert torch.equal(tokens, expected)
                if other is not None:
                    (result,) = await asyncio.gather(other, return_exceptions=True)
                    if call is not reopen or not isinstance(result, LayerstreamError):
                        assert torch.equal(result, expected)
                stats = model.stats()
                assert (stats.requests_riding, stats.reserved_bytes) == (0, 0)
            assert our_tasks() == []
            if not reached:
                return number
            number += step

    with nothing_left_behind():
        assert run(main()) > 0


@pytest.mark.parametrize("left_after", range(4))
def test_a_consumer_that_leaves_after_any_token_disturbs_nobody(folder, left_after):
    async def main():
        async with await open_streaming(folder, reader="direct") as model:
            expected = await model.generate(**INPUTS, **GREEDY)
            other = asyncio.create_task(model.generate(**INPUTS, **GREEDY))
            leaving = model.stream(**INPUTS, **GREEDY)
            for _ in range(left_after):
                await anext(leaving, None)
            await leaving.aclose()
            assert torch.equal(await other, expected)
            assert torch.equal(await model.generate(**INPUTS, **GREEDY), expected)
            assert (model.stats().requests_riding, model.stats().reserved_bytes) == (0, 0)

    with nothing_left_behind():
        run(main())
