"""A KV cache in host RAM: which models and calls get one, what it moves, and that it changes no bit.

test_cuda_memory.py tests it on a GPU; here both of its devices are the CPU.
"""

import dataclasses
import warnings

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import CACHE, CASES, inputs_for, save_model
from support.streaming import SMALL

from layerstream.pipeline import Budget, StreamedModel, load_streamed, opening
from layerstream.pipeline.modeling import host_kv_cache
from layerstream.pipeline.modeling.host_kv_cache import check_host_cache, with_host_cache
from layerstream.stages.errors import PlanError


def loaded(folder, case, **settings):
    kind = getattr(transformers, CASES[case].model)
    return kind.from_pretrained(save_model(folder, case, **settings)).eval()


@pytest.fixture
def moved(monkeypatch):
    """The moves of layers, each to new memory."""
    moves = []

    def move(layer, device):
        moves.append((id(layer), device.type))
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    monkeypatch.setattr(host_kv_cache, "_move_layer", move)
    return moves


OPTIONS = [
    pytest.param({"do_sample": False}, id="greedy"),
    pytest.param({"num_beams": 3, "do_sample": False}, id="beams"),
    pytest.param({"prompt_lookup_num_tokens": 3, "do_sample": False}, id="prompt lookup"),
    pytest.param({"prefill_chunk_size": 2, "do_sample": False}, id="a prompt in pieces"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", ["llama", "gemma3", "deepseek-v3", "gpt2"])
def test_tokens_are_those_of_a_cache_on_the_device(tmp_path, moved, case, options):
    model, ids = loaded(tmp_path, case), inputs_for(case)["input_ids"]
    ids = ids[:1] if "prompt_lookup_num_tokens" in options else ids
    expected = model.generate(ids, max_new_tokens=6, **options)
    named = with_host_cache(model, "generate", (), {"input_ids": ids, **options})
    assert torch.equal(model.generate(**named, max_new_tokens=6), expected)
    assert moved


def test_a_layer_is_on_the_device_only_while_it_computes(tmp_path, moved):
    model, ids = loaded(tmp_path, "llama"), inputs_for("llama")["input_ids"]
    cache = with_host_cache(model, "forward", (ids,), {})[CACHE]
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        first, second = (id(layer) for layer in cache.layers)
        assert moved == [(first, "cpu"), (second, "cpu")]
        moved.clear()
        model(ids[:, :1], **{CACHE: cache})
    assert moved[:2] == [
        (first, "cpu"),
        (first, "cpu"),
    ]  # to the device, here the CPU too, and back
    assert [layer for layer, _ in moved] == [first, first, second, second]


def test_a_cache_implementation_that_generate_takes_for_unset_is_ignored(tmp_path, moved):
    model, ids = loaded(tmp_path, "gemma3"), inputs_for("gemma3")["input_ids"]
    model.generation_config.cache_implementation = "hybrid"  # as the checkpoints on the hub have it
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    named = with_host_cache(model, "generate", (ids,), {"do_sample": False})
    assert torch.equal(model.generate(ids, max_new_tokens=4, **named), expected)
    assert moved


@pytest.mark.parametrize(
    "named",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache": transformers.DynamicCache()},
        {"past_key_values": transformers.DynamicCache()},
        {"generation_config": transformers.GenerationConfig(use_cache=False)},
    ],
    ids=lambda named: next(iter(named)),
)
def test_a_call_that_sets_its_cache_is_left_unchanged(tmp_path, named):
    model = loaded(tmp_path, "llama")
    assert with_host_cache(model, "generate", (), named) == named


@pytest.mark.parametrize(
    "config", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_a_forward_pass_ignores_the_settings_of_generation(tmp_path, config):
    model, ids = loaded(tmp_path, "llama"), inputs_for("llama")["input_ids"]
    model.generation_config.update(**config)
    assert with_host_cache(model, "generate", (ids,), {}) == {}
    named = with_host_cache(model, "forward", (ids,), {})
    assert named[CACHE].on_host
    with torch.no_grad():
        output = model(ids, **named)
        assert torch.equal(output.logits, model(ids).logits)
    assert output[CACHE] is named[CACHE]


@pytest.mark.parametrize(
    ("in_config", "named", "kept"),
    [(False, {}, False), (False, {"use_cache": True}, True), (True, {"use_cache": False}, False)],
)
def test_the_models_config_decides_whether_a_forward_pass_keeps_a_cache(
    tmp_path, in_config, named, kept
):
    model, ids = loaded(tmp_path, "llama"), inputs_for("llama")["input_ids"]
    model.config.use_cache = in_config
    assert (CACHE in model(ids, **named)) == kept
    assert (CACHE in with_host_cache(model, "forward", (ids,), named)) == kept


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("what", ["forward", "generate"])
def test_none_for_a_cache_under_any_name_is_replaced_by_one_cache(tmp_path, what, name):
    model = loaded(tmp_path, "llama")
    named = with_host_cache(model, what, (), {name: None})
    assert list(named) == [CACHE]
    assert named[CACHE].on_host


def test_a_cache_of_none_that_is_passed_by_position_is_left_unchanged(tmp_path):
    model, ids = loaded(tmp_path, "llama"), inputs_for("llama")["input_ids"]
    positional = (ids, None, None, None)  # mask, positions, cache
    model(*positional, **with_host_cache(model, "forward", positional, {}))


def plan_cache_on_host(monkeypatch):
    """Make every plan keep its KV cache on the host, as if VRAM could not hold it."""
    original = opening.plan_model

    def make_plan(*args, **options):
        return dataclasses.replace(original(*args, **options), kv_cache_on_host=True)

    monkeypatch.setattr(opening, "plan_model", make_plan)


def test_the_drop_in_keeps_the_cache_of_a_direct_call_on_the_host(tmp_path, monkeypatch, moved):
    folder, ids = save_model(tmp_path / "model", "llama"), inputs_for("llama")["input_ids"]
    expected = transformers.LlamaForCausalLM.from_pretrained(folder)(
        torch.cat((ids, ids[:, :1]), dim=1)
    )
    plan_cache_on_host(monkeypatch)
    with (
        nothing_left_behind(),
        load_streamed(folder, device="cpu", budget=Budget(host="64MiB"), workload=SMALL) as model,
    ):
        first = model(ids)
        assert first[CACHE].on_host
        second = model(ids[:, :1], **{CACHE: first[CACHE]})
        assert second[CACHE] is first[CACHE]
        torch.testing.assert_close(second.logits[:, -1], expected.logits[:, -1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions warn the caller
            third = model(ids[:, :1], past_key_values=second[CACHE])
        assert third[CACHE] is first[CACHE]
        assert CACHE not in model(ids, use_cache=False)
        assert moved
        moved.clear()
        assert not hasattr(model.model(ids)[CACHE], "on_host")  # a part of the model
        assert not moved


@pytest.mark.parametrize("case", ["llama", "mamba"])
def test_no_deprecated_name_of_a_cache_is_used(tmp_path, monkeypatch, case):
    logged = []
    logger = transformers.utils.generic.logger  # it says each thing once in a process
    monkeypatch.setattr(logger, "warning_once", lambda *said: logged.append(said))
    folder, ids = save_model(tmp_path / "model", case), inputs_for(case)["input_ids"]
    if case == "llama":
        plan_cache_on_host(monkeypatch)
    options = {"device": "cpu", "budget": Budget(host="64MiB"), "workload": SMALL}
    with load_streamed(folder, **options) as model:
        model(ids, use_cache=True)
        model.generate(ids, max_new_tokens=3, do_sample=False)

    async def main() -> None:
        async with StreamedModel.open(folder, **options) as streamed:
            await streamed.forward(input_ids=ids, use_cache=True)

    run(main())
    assert not logged


@pytest.mark.parametrize("case", ["mamba", "t5", "bert", "qwen3-next"])
def test_a_model_with_a_cache_of_another_kind_is_refused(tmp_path, case):
    with pytest.raises(PlanError, match=r"cannot live on the host .* raise the VRAM budget"):
        check_host_cache(loaded(tmp_path, case))


@pytest.mark.parametrize("case", ["llama", "gemma3", "deepseek-v3", "gpt2", "qwen3-moe"])
def test_a_model_with_a_cache_of_attention_may_have_it_on_the_host(tmp_path, case):
    check_host_cache(loaded(tmp_path, case))
