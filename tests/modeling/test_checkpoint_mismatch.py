"""Checkpoints that do not fit their model are refused, with the reason."""

from typing import Any

import pytest
import torch
import transformers
from support.traced import Save, rewrite, trace

from layerstream.stages.errors import ModelError


def test_missing_tensors_are_refused_before_anything_is_allocated(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]

    folder = rewrite(save(), drop)

    def allocate(*_: Any, **__: Any) -> None:
        pytest.fail("transformers has initialised weights")

    monkeypatch.setattr(
        transformers.PreTrainedModel, "_move_missing_keys_from_meta_to_device", allocate
    )
    with pytest.raises(ModelError, match=r"lacks 6 of the 21 tensors .*model\.layers\.0\.mlp\."):
        trace(folder)


def test_a_tied_weight_that_is_stored_under_neither_name_is_missing(save: Save) -> None:
    folder = rewrite(save("llama-tied"), lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ModelError, match=r"lacks 2 of .*lm_head\.weight"):
        trace(folder)


def test_a_head_that_the_checkpoint_lacks_is_not_initialised(save: Save) -> None:
    with pytest.raises(ModelError, match=r"lacks 1 of .*lm_head\.weight.*model_class="):
        trace(save(model="LlamaModel"), "LlamaForCausalLM")


def test_a_shape_that_disagrees_is_refused_with_both_shapes_and_the_file(save: Save) -> None:
    folder = rewrite(save(), lambda tensors: tensors.update({"model.norm.weight": torch.zeros(33)}))
    with pytest.raises(
        ModelError, match=r"model\.norm\.weight .* shape \(32,\), .*model\.safetensors .*\(33,\)"
    ):
        trace(folder)


def test_experts_of_different_shapes_are_refused(save: Save) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    folder = rewrite(save("mixtral"), lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts.*do not fit together.*size"):
        trace(folder)
