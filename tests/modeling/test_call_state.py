"""What a call leaves on modules stays with the cache that it returns, and with no other request."""

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.loop import run
from support.models import CACHE, save_model
from support.streaming import bits_equal, open_streaming

VISION = {
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 4,
    "hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "mlp_ratio": 2,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
IMAGE, START, END = 7, 8, 9
STEPS = 3


def save_qwen2_vl(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def prompt(side: int) -> dict[str, torch.Tensor]:
    """A prompt with an image of ``side`` x ``side`` patches, which shifts the positions behind it."""
    tokens = [3, START, *[IMAGE] * (side * side // 4), END, 5, 6]
    ids = torch.tensor([tokens])
    pixels = torch.randn(
        (side * side, 3 * 2 * 4 * 4), generator=torch.Generator().manual_seed(side)
    )
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


async def conversation(call: Any, side: int) -> list[torch.Tensor]:
    """The logits of a prompt and of each token behind it, chosen greedily, over the cache of the calls."""
    output = await call(**prompt(side), use_cache=True)
    found = [output.logits[:, -1:]]
    for _ in range(STEPS):
        output = await call(
            input_ids=found[-1].argmax(-1), use_cache=True, **{CACHE: output[CACHE]}
        )
        found.append(output.logits)
    return found


def expected(folder: Path, side: int) -> list[torch.Tensor]:
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder)

    async def call(**named: Any) -> Any:
        with torch.no_grad():
            return model(**named)

    return asyncio.run(conversation(call, side))


def test_conversations_of_calls_keep_the_state_that_they_leave_on_modules(tmp_path: Path) -> None:
    folder = save_qwen2_vl(tmp_path / "model")
    wanted = [expected(folder, side) for side in (8, 4)]

    async def main() -> None:
        async with await open_streaming(folder) as model:
            found = await asyncio.gather(*(conversation(model.forward, side) for side in (8, 4)))
        for one, other in zip(found, wanted, strict=True):
            assert all(bits_equal(a, b) for a, b in zip(one, other, strict=True))

    run(main())


def test_a_copied_cache_takes_its_state_along(tmp_path: Path) -> None:
    folder = save_qwen2_vl(tmp_path / "model")
    wanted = expected(folder, 8)

    async def main() -> None:
        async with await open_streaming(folder) as model:
            output = await model.forward(**prompt(8), use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            cache = copy.deepcopy(output[CACHE])
            await model.forward(**prompt(4), use_cache=True)
            again = await model.forward(input_ids=token, use_cache=True, **{CACHE: cache})
            assert bits_equal(again.logits, wanted[1])

    run(main())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_of_a_long_prompt_stay_with_its_cache(kind: str, tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        parameters["original_max_position_embeddings"] = 16
    folder = save_model(
        tmp_path / "model", "llama", rope_parameters=parameters, max_position_embeddings=16
    )
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    long, token = torch.arange(3, 33)[None], torch.tensor([[5]])
    with torch.no_grad():
        first = reference(long, use_cache=True)
        second = reference(token, use_cache=True, **{CACHE: first[CACHE]})

    async def main() -> None:
        async with await open_streaming(folder) as model:
            output = await model.forward(long, use_cache=True)
            await model.forward(token)
            again = await model.forward(token, use_cache=True, **{CACHE: output[CACHE]})
            assert bits_equal(again.logits, second.logits)

    run(main())
