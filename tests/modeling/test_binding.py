"""Weights whose layer is not loaded: small ones are read anew, large ones raise."""

from pathlib import Path

import pytest
import torch
import transformers
from support.loop import run
from support.models import inputs_for, save_model
from support.streaming import open_streaming

from layerstream.pipeline import (
    ModelError,
)


def test_large_weights_raise_when_they_are_used_outside_of_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerstream.pipeline.modeling.weight_sources.SMALL_WEIGHT_BYTES", 0)
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            await model.forward(**inputs_for("llama"))
            weight = model.module.model.layers[0].mlp.up_proj.weight
            assert (weight.shape, weight.device.type) == ((64, 32), "cpu")
            with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight is used"):
                weight + 1
            assert model.module.device.type == "cpu"

    run(main())


def test_small_weights_are_read_anew_outside_of_a_pass_but_not_written(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    stored = transformers.LlamaForCausalLM.from_pretrained(folder).get_parameter(name)

    async def main() -> None:
        async with await open_streaming(folder) as model:
            weight = model.module.get_parameter(name)
            assert torch.equal(weight.t() + 1, stored.t() + 1)
            with pytest.raises(ModelError, match="cannot be changed in place"), torch.no_grad():
                weight.zero_()

    run(main())
