"""Passes on the meta device leave nothing in the process."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.loop import run
from support.models import save_model
from support.streaming import SMALL, bits_equal
from transformers import pytorch_utils

from layerstream.pipeline import Budget, StreamedModel, load_streamed
from layerstream.pipeline.modeling.meta_pass import on_meta


def test_opening_a_model_leaves_no_meta_tensors_in_the_caches_of_transformers(
    tmp_path: Path,
) -> None:
    # Its tables of relative positions are cached by their size alone, for every model in the process.
    cached_size = (3, 3)
    config = transformers.BeitConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=8,
        out_indices=[1, 2],
        use_relative_position_bias=True,
    )
    transformers.BeitModel(config).save_pretrained(tmp_path)
    pixels = torch.randn((1, 3, 24, 24), generator=torch.Generator().manual_seed(1))

    async def main() -> torch.Tensor:
        budget = Budget(host="1GiB")
        async with StreamedModel.open(
            tmp_path, device="cpu", budget=budget, workload=SMALL, measure=False
        ) as model:
            output: torch.Tensor = (await model.forward(pixel_values=pixels)).last_hidden_state
            return output

    streamed = run(main())
    kind = transformers.models.beit.modeling_beit.BeitRelativePositionBias
    assert kind.generate_relative_position_index(cached_size).device.type == "cpu"
    with torch.no_grad():
        expected = transformers.BeitModel.from_pretrained(tmp_path)(pixel_values=pixels)
    assert bits_equal(streamed, expected.last_hidden_state)


def test_other_threads_still_cache() -> None:
    calls: list[int] = []

    @pytorch_utils.compile_compatible_method_lru_cache()
    def zeros(number: int) -> torch.Tensor:
        calls.append(number)
        return torch.zeros(number)

    def call_in_thread() -> None:
        assert zeros(2) is zeros(2)

    with on_meta():
        assert zeros(1).is_meta
        assert zeros(1) is not zeros(1)
        thread = threading.Thread(target=call_in_thread)
        thread.start()
        thread.join()
    assert calls == [1, 1, 1, 2]
    assert not zeros(1).is_meta


def test_an_error_in_a_pass_puts_back_what_was_replaced() -> None:
    original = pytorch_utils.is_torchdynamo_compiling

    def fails() -> None:
        with on_meta():
            assert pytorch_utils.is_torchdynamo_compiling()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert pytorch_utils.is_torchdynamo_compiling is original
    assert not torch.zeros(1).is_meta


def test_opening_with_flexible_attention_compiles_nothing_that_others_use(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters
    from transformers.integrations import flex_attention

    folder = save_model(tmp_path / "model", "llama")
    torch.compiler.reset()  # also what other tests have compiled
    counters.clear()
    before = flex_attention.WrappedFlexAttention.__call__
    options: dict[str, Any] = {"attn_implementation": "flex_attention", "measure": False}
    options["workload"] = SMALL
    load_streamed(folder, device="cpu", budget=Budget(host="64MiB"), **options).close()
    # The mask's graph alone, whose values do not depend on how it is compiled.
    assert counters["stats"]["unique_graphs"] <= 1
    assert flex_attention.WrappedFlexAttention.__call__ is before
