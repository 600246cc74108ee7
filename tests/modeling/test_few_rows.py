"""Mixtures in bfloat16 compute decoding steps with a kernel of ours, with the bits of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.loop import run
from support.models import save_model
from support.streaming import bits_equal, open_streaming

from layerstream.stages.unpack.bfloat_rows import BfloatMatrices, summed_columns


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_few_tokens_have_the_bits_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    if not summed_columns(512, 512):
        pytest.skip("this processor has no AVX-512 BF16, or torch sums in another order on it")
    sizes = {"num_experts": 8, "hidden_size": 512, "moe_intermediate_size": 256}
    folder = save_model(tmp_path / "model", "qwen3-moe", torch.bfloat16, **sizes)
    whole = transformers.Qwen3MoeForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 3 + tokens)[None]
    logits = whole(input_ids=ids).logits.detach()
    generated = whole.generate(ids, max_new_tokens=6, do_sample=False)
    products, calls = BfloatMatrices.products, list[int]()

    def counted(self: Any, places: Any, counts: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return products(self, places, counts, inputs)

    monkeypatch.setattr(BfloatMatrices, "products", counted)

    async def main() -> None:
        async with await open_streaming(folder, reader="direct") as model:
            assert bits_equal((await model.forward(input_ids=ids)).logits, logits)
            assert torch.equal(
                await model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), generated
            )

    run(main())
    assert calls
