"""Clones of module trees: what a request writes to is its own."""

from functools import cached_property

import pytest
import torch
import transformers
from support.models import CASES, save_model

from layerstream.pipeline.modeling.clone import clone_modules


@pytest.fixture(params=["qwen3-moe", "whisper"])
def model(request, tmp_path):
    kind = getattr(transformers, CASES[request.param].model)
    return kind.from_pretrained(save_model(tmp_path, request.param)).eval()


def test_a_clone_has_a_config_of_its_own_that_all_its_modules_share(model):
    clone = clone_modules(model)
    assert clone.config.to_dict() == model.config.to_dict()
    pairs = [
        (own.config, module.config)
        for own, module in zip(clone.modules(), model.modules(), strict=True)
        if hasattr(module, "config")
    ]
    assert len(pairs) > 3
    assert len({id(own) for own, _ in pairs}) == len({id(original) for _, original in pairs})
    assert not {id(own) for own, _ in pairs} & {id(original) for _, original in pairs}


def test_what_generate_writes_to_the_config_of_one_request_is_not_seen_by_another(tmp_path):
    folder = save_model(tmp_path, "qwen3-moe")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder)
    before = model.get_experts_implementation()
    one, other = clone_modules(model), clone_modules(model)
    one.set_experts_implementation("batched_mm")
    experts = [module for module in one.modules() if type(module).__name__.endswith("Experts")]
    assert experts
    assert {module.config._experts_implementation for module in experts} == {"batched_mm"}
    assert other.get_experts_implementation() == model.get_experts_implementation() == before
    assert "batched_mm" not in before.values()


class Words:
    """What a model computes with that is no module, and keeps what it has computed."""

    @cached_property
    def numbers(self) -> torch.Tensor:
        return torch.zeros(3)


class Speaks(torch.nn.Module):
    def __init__(self, words):
        super().__init__()
        self.words = words

    def forward(self):
        return self.words.numbers


def test_what_an_object_of_the_models_own_code_keeps_is_not_seen_by_another_clone():
    words = Words()
    model = torch.nn.Sequential(Speaks(words), Speaks(words))
    one, other = clone_modules(model), clone_modules(model)
    assert one[0].words is one[1].words
    with torch.device("meta"):
        assert one[0]().is_meta
    assert not other[0]().is_meta
    assert not vars(words)
