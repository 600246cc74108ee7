"""Models run on event loops in debug mode, which refuse calls from other threads, and on uvloop."""

import asyncio
from functools import partial

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind
from support.models import inputs_for, save_model
from support.streaming import open_streaming

SECONDS = 100


def runner(kind):
    if kind == "debug":
        return asyncio.Runner(debug=True)
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as first:  # the process keeps its pipe
        first.run(asyncio.sleep(0))
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


@pytest.mark.parametrize("kind", ["debug", "uvloop"])
@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_requests_finish_are_cancelled_and_left_and_the_model_is_closed(tmp_path, kind, reader):
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    inputs = inputs_for("llama")
    endless = partial(dict, inputs, max_new_tokens=300, do_sample=False)

    async def use():
        async with asyncio.timeout(SECONDS), await open_streaming(folder, reader=reader) as model:
            output = await model.forward(**inputs)
            stream = model.stream(**endless())
            await anext(stream)
            cancelled = asyncio.create_task(model.generate(**endless()))
            while model.stats().requests_riding < 2:
                await anext(stream)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert cancelled.cancelled()
            await stream.aclose()
            await model.replan()
            assert torch.equal((await model.forward(**inputs)).logits, output.logits)
        return output.logits

    on_loop = runner(kind)
    with nothing_left_behind(), on_loop:
        logits = on_loop.run(use())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits, model(**inputs).logits)
