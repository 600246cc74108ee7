"""A KV cache in host RAM: for whom there is one, what it moves, and that it changes no bit.

On a GPU it is proven in test_cuda.py; here both of its places are the processor's memory.
"""

import pytest
import torch
import transformers
from support.models import CASES, inputs_for, save_model

from layerstream.pipeline import host_cache
from layerstream.pipeline.host_cache import check_host_cache, with_host_cache
from layerstream.stages.errors import PlanError


def loaded(folder, case, **settings):
    kind = getattr(transformers, CASES[case].model)
    return kind.from_pretrained(save_model(folder, case, **settings)).eval()


@pytest.fixture
def moved(monkeypatch):
    """What is moved, each time to memory of its own."""
    moves = []

    def move(layer, device):
        moves.append((id(layer), device.type))
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    monkeypatch.setattr(host_cache, "_move", move)
    return moves


ASKED = [
    pytest.param({"do_sample": False}, id="greedy"),
    pytest.param({"num_beams": 3, "do_sample": False}, id="beams"),
    pytest.param({"prompt_lookup_num_tokens": 3, "do_sample": False}, id="prompt lookup"),
    pytest.param({"prefill_chunk_size": 2, "do_sample": False}, id="a prompt in pieces"),
]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("case", ["llama", "gemma3", "deepseek-v3", "gpt2"])
def test_tokens_are_those_of_a_cache_on_the_device(tmp_path, moved, case, asked):
    model, ids = loaded(tmp_path, case), inputs_for(case)["input_ids"]
    ids = ids[:1] if "prompt_lookup_num_tokens" in asked else ids
    expected = model.generate(ids, max_new_tokens=6, **asked)
    named = with_host_cache(model, model.generate, (), {"input_ids": ids, **asked})
    assert torch.equal(model.generate(**named, max_new_tokens=6), expected)
    assert moved


def test_a_layer_is_on_the_device_only_while_it_computes(tmp_path, moved):
    model, ids = loaded(tmp_path, "llama"), inputs_for("llama")["input_ids"]
    cache = with_host_cache(model, model.forward, (ids,), {})["past_key_values"]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        first, second = (id(layer) for layer in cache.layers)
        assert moved == [(first, "cpu"), (second, "cpu")]
        moved.clear()
        model(ids[:, :1], past_key_values=cache)
    assert moved[:2] == [(first, "cpu"), (first, "cpu")]  # there, on this machine, and back
    assert [layer for layer, _ in moved] == [first, first, second, second]


def test_a_kind_of_cache_that_generate_takes_for_unset_is_no_other(tmp_path, moved):
    model, ids = loaded(tmp_path, "gemma3"), inputs_for("gemma3")["input_ids"]
    model.generation_config.cache_implementation = "hybrid"  # as the checkpoints on the hub have it
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    named = with_host_cache(model, model.generate, (ids,), {"do_sample": False})
    assert torch.equal(model.generate(ids, max_new_tokens=4, **named), expected)
    assert moved


@pytest.mark.parametrize(
    "named",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": transformers.DynamicCache()},
        {"generation_config": transformers.GenerationConfig(use_cache=False)},
    ],
    ids=lambda named: next(iter(named)),
)
def test_who_brings_a_cache_or_wants_none_is_let_alone(tmp_path, named):
    model = loaded(tmp_path, "llama")
    assert with_host_cache(model, model.generate, (), named) == named


@pytest.mark.parametrize("case", ["mamba", "t5", "bert", "qwen3-next"])
def test_a_model_with_a_cache_of_another_kind_is_refused(tmp_path, case):
    with pytest.raises(PlanError, match=r"cannot live on the host .* raise the VRAM budget"):
        check_host_cache(loaded(tmp_path, case))


@pytest.mark.parametrize("case", ["llama", "gemma3", "deepseek-v3", "gpt2", "qwen3-moe"])
def test_a_model_with_a_cache_of_attention_may_have_it_on_the_host(tmp_path, case):
    check_host_cache(loaded(tmp_path, case))
