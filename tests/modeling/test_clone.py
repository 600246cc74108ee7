"""Clones of module trees: what one request writes, no other one sees."""

import copy
import weakref
from functools import cached_property

import pytest
import torch
import transformers
from support.models import CASES, save_model

from layerstream.pipeline.modeling.clone import ModuleFunction, clone_modules


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


class TokenMap:
    """An object of a model's code that is not a module, and caches what it has computed."""

    @cached_property
    def indices(self) -> torch.Tensor:
        return torch.zeros(3)


class MapsTokens(torch.nn.Module):
    def __init__(self, token_map):
        super().__init__()
        self.token_map = token_map

    def forward(self):
        return self.token_map.indices


def test_what_an_object_of_the_models_own_code_caches_is_not_seen_by_another_clone():
    token_map = TokenMap()
    model = torch.nn.Sequential(MapsTokens(token_map), MapsTokens(token_map))
    one, other = clone_modules(model), clone_modules(model)
    assert one[0].token_map is one[1].token_map
    with torch.device("meta"):
        assert one[0]().is_meta
    assert not other[0]().is_meta
    assert not vars(token_map)


@pytest.mark.parametrize("copied", [clone_modules, copy.deepcopy])
def test_a_function_that_stands_for_a_method_is_of_the_clone(copied):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].own = ModuleFunction(weakref.ref(model[0]))
    assert copied(model)[0].own.module() is not model[0]
    assert model[0].own.module() is model[0]
