"""A pass that is made again for want of memory: its random numbers come again, wherever in the model it began."""

import asyncio

import pytest
import torch
import transformers
from support.gpus import StandIn
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import inputs_for, save_model
from support.out_of_memory import OutOfMemory, opened
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5LayerFF

SIZE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
INPUTS = inputs_for("llama")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    return StandIn(monkeypatch)


@pytest.fixture
def noisy(monkeypatch):
    """Each MLP of llamas adds random numbers, in evaluation too, as some mixtures do to the scores of their experts."""
    works = LlamaMLP.forward

    def forward(self, hidden):
        return works(self, hidden) + torch.randn_like(hidden)

    monkeypatch.setattr(LlamaMLP, "forward", forward)


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize("training", [False, True])
def test_a_pass_that_is_made_again_draws_the_same_random_numbers(tmp_path, monkeypatch, training):
    folder = save_model(tmp_path / "model", "llama", **SIZE)

    async def main():
        async with await opened(folder) as model:
            model.module.train(training)
            torch.manual_seed(5)
            expected = await model.forward(**INPUTS)
            fault = OutOfMemory(monkeypatch, LlamaMLP, "forward", at=3)
            torch.manual_seed(5)
            output = await model.forward(**INPUTS)
            assert fault.raised == 1
            return output.logits, expected.logits

    with nothing_left_behind():
        assert torch.equal(*run(main()))


@pytest.mark.usefixtures("noisy")
def test_a_call_of_the_module_itself_draws_the_same_random_numbers_too(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", "llama", **SIZE)

    async def main():
        async with await opened(folder) as model:

            def call():
                torch.manual_seed(5)
                return model.module(**INPUTS).logits

            expected = await asyncio.to_thread(call)
            # It is counted on the event loop, while the thread goes on.
            fault = OutOfMemory(monkeypatch, LlamaMLP, "forward", at=3)
            assert torch.equal(await asyncio.to_thread(call), expected)
            assert fault.raised == 1

    with nothing_left_behind():
        run(main())


@pytest.mark.usefixtures("noisy")
def test_numbers_that_others_may_have_drawn_too_do_not_come_again(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", "llama", **SIZE)
    sampled = {"do_sample": True, "max_new_tokens": 4}

    async def main():
        async with await opened(folder) as model:
            fault = OutOfMemory(monkeypatch, LlamaMLP, "forward", at=9)
            restored = []
            monkeypatch.setattr(torch, "set_rng_state", restored.append)
            await asyncio.gather(*(model.generate(**INPUTS, **sampled) for _ in range(2)))
            assert (fault.raised, restored) == (1, [])
            model.module.train()
            fault.raised = fault.calls = 0
            with pytest.raises(Exception, match="beside other requests"):
                await asyncio.gather(*(model.generate(**INPUTS, **sampled) for _ in range(2)))

    with nothing_left_behind():
        run(main())


def test_a_pass_that_begins_at_an_encoder_is_made_again(tmp_path, monkeypatch):
    sizes = {"d_model": 128, "d_ff": 512, "num_layers": 4, "num_decoder_layers": 4}
    folder = save_model(tmp_path / "model", "t5", **sizes)
    inputs, greedy = inputs_for("t5"), {"do_sample": False, "max_new_tokens": 4}
    inputs = {"input_ids": inputs["input_ids"]}

    async def main():
        async with await opened(folder) as model:
            fault = OutOfMemory(monkeypatch, T5LayerFF, "forward", at=2)  # in the encoder
            tokens = await model.generate(**inputs, **greedy)
            assert fault.raised == 1
        return tokens

    with nothing_left_behind():
        tokens = run(main())
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert torch.equal(tokens, reference.generate(**inputs, **greedy))
