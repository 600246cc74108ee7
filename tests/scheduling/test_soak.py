"""Many requests of all kinds at once, with every way to end: results are right, and nothing is left behind."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind, our_tasks
from support.loop import run
from support.models import save_model
from support.streaming import bits_equal, open_streaming
from transformers import LogitsProcessor

from layerstream.pipeline import AdmissionError, StreamedModel, Workload

REQUESTS = 60


class Sampled(LogitsProcessor):
    """Sampling by the Gumbel trick, with a generator of its own: torch's is shared by all threads."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(scores.shape, generator=self._random).clamp(1e-9)
        return scores - torch.log(-torch.log(noise))


def arguments_of(number: int) -> dict[str, Any]:
    """The arguments of request ``number``: new ones for each call, since processors have state."""
    choose = random.Random(number)
    rows, length = choose.choice([(1, 3), (1, 8), (1, 20), (2, 6), (3, 11)])
    ids = torch.tensor([[choose.randrange(3, 100) for _ in range(length)] for _ in range(rows)])
    options: dict[str, Any] = choose.choice(
        [
            {},
            {"num_beams": 3},
            {"num_beams": 2, "num_return_sequences": 2},
            {"logits_processor": [Sampled(number)]},
            {"prompt_lookup_num_tokens": 3} if rows == 1 else {},
            {"use_cache": False},
            {"repetition_penalty": 1.3},
        ]
    )
    mask = torch.ones_like(ids)
    limits = {"max_new_tokens": choose.randrange(1, 24), "do_sample": False}
    return {"input_ids": ids, "attention_mask": mask, **limits, **options}


async def serve(model: StreamedModel, number: int, expected: torch.Tensor) -> str:
    """Make request ``number``, end it in one of many ways, check its result, and return which way that was."""
    choose = random.Random(1000 + number)
    arguments = arguments_of(number)
    way = choose.choice(["wait", "wait", "wait", "cancel", "deadline", "leave", "too much"])
    if way == "too much":
        with pytest.raises(AdmissionError):
            await model.generate(**{**arguments, "max_new_tokens": 1_000_000})
    elif way == "cancel":
        task = asyncio.create_task(model.generate(**arguments))
        for _ in range(choose.randrange(200)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            assert torch.equal(task.result(), expected)
    elif way == "deadline":
        try:
            async with asyncio.timeout(choose.random() / 5):
                assert torch.equal(await model.generate(**arguments), expected)
        except TimeoutError:
            pass
    elif way == "leave":
        ids = arguments["input_ids"][:1]
        stream = model.stream(input_ids=ids, max_new_tokens=2000, do_sample=False)
        for _ in range(choose.randrange(1, 6)):
            await anext(stream)
        await stream.aclose()
    else:
        assert torch.equal(await model.generate(**arguments), expected)
        output = await model.forward(arguments["input_ids"])
        assert output.logits.isfinite().all()
    return way


@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen3-moe"])
def test_requests_of_all_kinds_at_once_end_correctly_and_leave_nothing_behind(
    case: str, tmp_path: Path
) -> None:
    settings = {"n_positions": 4096} if case == "gpt2" else {}
    folder = save_model(tmp_path / "model", case, **settings)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = [reference.generate(**arguments_of(number)) for number in range(REQUESTS)]
    with torch.no_grad():
        logits = reference(torch.tensor([[5, 6, 7]])).logits

    async def main() -> None:
        workload = Workload(batch_size=4, prompt_tokens=64, new_tokens=2000)
        options = {"workload": workload, "max_requests": 6, "reader": "direct"}
        async with await open_streaming(folder, **options) as model:
            ways = await asyncio.gather(
                *(serve(model, number, expected[number]) for number in range(REQUESTS))
            )
            stats = model.stats()
            assert stats.requests_completed >= ways.count("wait")
            assert stats.requests_refused == ways.count("too much")
            assert stats.requests_failed == 0
            assert (stats.requests_riding, stats.requests_waiting) == (0, 0)
            assert (stats.reserved_bytes, stats.riders_aboard) == (0, 0)
            assert stats.sweeps < stats.passes
            output = await model.forward(torch.tensor([[5, 6, 7]]))
            assert bits_equal(output.logits, logits)
        assert our_tasks() == []

    with nothing_left_behind():
        run(main(), seconds=120)
