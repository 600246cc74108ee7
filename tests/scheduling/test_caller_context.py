"""What is set in the caller's thread has its effect on requests, and costs no more than it must."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.loop import run
from support.models import save_model
from support.streaming import bits_equal

from layerstream.pipeline import Budget, StreamedModel, load_streamed
from layerstream.pipeline.modeling.call_arguments import kept_positions

IDS = torch.arange(3, 12)[None]
OPTIONS: dict[str, Any] = {"device": "cpu", "measure": False, "budget": Budget(host="64MiB")}
STEPS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}


def test_autocast_of_the_caller_holds_for_its_requests_and_for_no_others(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)

    def expected() -> list[torch.Tensor]:
        with torch.no_grad():
            steps = reference.generate(IDS, **STEPS, return_dict_in_generate=True)
            return [reference(IDS).logits, *steps.logits]

    async def main() -> None:
        async with StreamedModel.open(folder, **OPTIONS) as model:

            async def found(dtype: torch.dtype | None) -> list[torch.Tensor]:
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    forward = asyncio.create_task(model.forward(IDS))
                    generated = model.generate(IDS, **STEPS, return_dict_in_generate=True)
                    # Autocast is the thread's, so a task must have begun before it is left.
                    await asyncio.sleep(0)
                    steps = asyncio.ensure_future(generated)
                    await asyncio.sleep(0)
                return [(await forward).logits, *(await steps).logits]

            for dtype in (torch.bfloat16, None, torch.float16):
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    wanted = expected()
                assert all(map(bits_equal, wanted, await found(dtype)))

    run(main())


def test_autocast_does_not_keep_the_casts_of_streamed_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    with load_streamed(folder, **OPTIONS) as model, torch.autocast("cpu", dtype=torch.bfloat16):
        seen = []
        model.model.layers[1].register_forward_hook(
            lambda *_: seen.append(torch.is_autocast_cache_enabled())
        )
        logits = model(IDS).logits
        assert seen == [False]
        assert torch.is_autocast_cache_enabled()
        assert bits_equal(logits, reference(IDS).logits)


@pytest.mark.parametrize(
    ("kept", "positions"),
    [
        (None, 100),
        (0, 100),
        (1, 1),
        (300, 100),
        (torch.tensor([3, 50, 99]), 3),
        (torch.tensor(99), 1),
        (torch.arange(300), 100),
        (slice(-5, None), 5),
        (slice(0, None, 2), 50),
    ],
    ids=str,
)
def test_logits_are_counted_for_the_positions_that_are_kept(kept: Any, positions: int) -> None:
    assert kept_positions(kept, 100) == positions


def test_logits_to_keep_as_a_tensor_are_priced_by_their_number(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    ids = torch.ones((1, 4000), dtype=torch.long)
    with load_streamed(folder, **OPTIONS) as model:
        estimate = vars(model)["_layerstream_close"].model.engine._estimator.forward
        two, also_two = (
            estimate((ids,), {"logits_to_keep": kept}).memory.nbytes
            for kept in (2, torch.tensor([5, 9]))
        )
        assert two == also_two < estimate((ids,), {}).memory.nbytes
