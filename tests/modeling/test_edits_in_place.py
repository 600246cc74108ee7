"""Changes in place of a drop-in's weights have the effect that they have on a model in memory, or are refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
import transformers
from support.models import CASES, inputs_for, save_model
from support.streaming import bits_equal, open_streaming

from layerstream.pipeline import Budget, ModelError, load_streamed

SMALL = {"device": "cpu", "measure": False, "budget": Budget(host="64MiB"), "layer_batch_size": 1}


def loaded(folder: Path, case: str) -> Any:
    return getattr(transformers, CASES[case].model).from_pretrained(folder)


def without_gradients(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return torch.no_grad()(change)


# Of a model that computes nothing, so that no layer is loaded.
IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "a weight": without_gradients(lambda model: model.model.norm.weight.mul_(2)),
    "data": lambda model: model.model.norm.weight.data.mul_(2),
    "an element": without_gradients(lambda model: model.model.norm.weight.__setitem__(0, 5.0)),
    "a row": without_gradients(
        lambda model: model.model.layers[0].mlp.up_proj.weight.__setitem__(0, 5.0)
    ),
    "a row of data": lambda model: model.lm_head.weight.data.__setitem__(5, 5.0),
    "a row of embeddings": without_gradients(
        lambda model: model.model.embed_tokens.weight.__setitem__(5, 5.0)
    ),
    "a view of a view": without_gradients(
        lambda model: model.lm_head.weight.view(-1)[:4].copy_(torch.ones(4))
    ),
    "an out argument": without_gradients(
        lambda model: torch.mul(model.model.norm.weight, 2, out=model.model.norm.weight)
    ),
    "a list": without_gradients(
        lambda model: torch._foreach_mul_([model.model.norm.weight, model.lm_head.weight], 2)
    ),
    "an initialisation": lambda model: torch.nn.init.ones_(model.lm_head.weight),
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_change_in_place_of_a_weight_that_is_not_loaded_is_refused(
    change: str, tmp_path: Path
) -> None:
    folder, options = save_model(tmp_path / "model", "llama"), SMALL
    inputs = inputs_for("llama")
    expected = loaded(folder, "llama")(**inputs).logits
    with load_streamed(folder, **options) as model:
        with pytest.raises(ModelError, match=r"data, which makes it resident"):
            IN_PLACE[change](model)
        assert bits_equal(model(**inputs).logits, expected)


def test_what_reads_parts_of_a_weight_goes_on_reading(tmp_path: Path) -> None:
    folder, options = save_model(tmp_path / "model", "llama"), SMALL
    expected = loaded(folder, "llama").lm_head.weight[:3].detach()
    with load_streamed(folder, **options) as model:
        part = model.lm_head.weight[:3]
        for found in (part.clone(), copy.deepcopy(part), torch.from_numpy(part.numpy()), part + 0):
            assert type(found) is torch.Tensor
            assert bits_equal(found, expected)


@pytest.mark.anyio
@pytest.mark.parametrize("reader", ["direct", "mmap"])
async def test_a_hook_that_changes_a_loaded_weight_in_place_makes_it_resident(
    reader: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    reference = loaded(folder, "llama")
    times = iter([2, 2, 3, 3])  # twice by each model

    def change(module: torch.nn.Module, _: Any) -> None:
        if (factor := next(times, None)) is not None:
            module.up_proj.weight.data[0] *= factor
            module.down_proj.weight.mul_(factor)

    async with await open_streaming(folder, reader=reader) as model:
        for root in (reference, model.module):
            root.model.layers[1].mlp.register_forward_pre_hook(change)
        with torch.no_grad():
            for _ in range(4):
                expected = reference(**inputs).logits
                assert bits_equal((await model.forward(**inputs)).logits, expected)


REMOVED: dict[str, Callable[[Any], Any]] = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "prune": lambda module: torch.nn.utils.prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.parametrize("way", REMOVED)
def test_a_weight_that_moves_to_another_name_is_computed_with(way: str, tmp_path: Path) -> None:
    folder, options = save_model(tmp_path / "model", "llama"), SMALL
    inputs = inputs_for("llama")
    reference = loaded(folder, "llama")
    with load_streamed(folder, **options) as model, torch.no_grad():
        model(**inputs)
        for each in (reference, model):
            REMOVED[way](each.model.layers[0].mlp.up_proj)
        for _ in range(2):
            assert bits_equal(model(**inputs).logits, reference(**inputs).logits)
