"""Edits of a drop-in's weights have the effect that they have on a model in memory, or are refused in one sentence."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from support.adapters import load_with_peft, lora, save_adapter
from support.loop import turns
from support.models import CASES, inputs_for, save_model
from support.streaming import bits_equal

from layerstream.pipeline import Budget, ModelError, PlanError, load_streamed

SMALL = {"device": "cpu", "measure": False, "budget": Budget(host="64MiB"), "layer_batch_size": 1}
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def loaded(folder: Path, case: str) -> Any:
    return getattr(transformers, CASES[case].model).from_pretrained(folder)


def reader_options(tmp_path: Path, case: str, reader: str) -> tuple[Path, dict[str, Any]]:
    return save_model(tmp_path / "model", case), {**SMALL, "reader": reader}


def by_data(owner: Any, name: str, value: torch.Tensor) -> None:
    getattr(owner, name).data = value


def by_parameter(owner: Any, name: str, value: torch.Tensor) -> None:
    setattr(owner, name, torch.nn.Parameter(value))


EDITS = [by_data, by_parameter]
PLACES = {
    "llama": ["model.layers.1.mlp.up_proj", "model.embed_tokens", "lm_head", "model.norm"],
    "llama-tied": ["model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.wpe", "lm_head"],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.parametrize("case", PLACES)
def test_an_edited_weight_is_what_is_computed_with(
    case: str, reader: str, edit: Callable[..., None], tmp_path: Path
) -> None:
    folder, options = reader_options(tmp_path, case, reader)
    inputs = inputs_for(case)
    for path in PLACES[case]:
        reference = loaded(folder, case)
        with load_streamed(folder, **options) as model, torch.no_grad():
            before = model(**inputs).logits
            for each in (model, reference):
                owner = each.get_submodule(path)
                torch.manual_seed(5)
                edit(owner, "weight", torch.randn(owner.weight.shape))
            for _ in range(2):
                logits = model(**inputs).logits
                assert bits_equal(logits, reference(**inputs).logits)
            assert not torch.equal(logits, before)
            expected = reference.generate(**inputs, **GREEDY)
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_an_edit_in_the_middle_of_a_pass_stays(tmp_path: Path) -> None:
    folder, options = reader_options(tmp_path, "llama", "direct")
    inputs = inputs_for("llama")
    reference = loaded(folder, "llama")
    new = torch.randn(reference.model.layers[0].mlp.up_proj.weight.shape)
    reference.model.layers[0].mlp.up_proj.weight.data = new
    with load_streamed(folder, **options) as model, torch.no_grad():
        layer = model.model.layers[0]

        def edit(*_: Any) -> None:
            handle.remove()
            layer.mlp.up_proj.weight.data = new

        handle = layer.mlp.register_forward_pre_hook(edit)
        for _ in range(2):
            assert bits_equal(model(**inputs).logits, reference(**inputs).logits)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_weight_takes_memory_of_requests(
    edit: Callable[..., None], tmp_path: Path
) -> None:
    folder, options = reader_options(tmp_path, "llama", "direct")
    inputs = inputs_for("llama")
    with load_streamed(folder, **options) as model:
        closer = vars(model)["_layerstream_close"]
        model(**inputs)
        available = closer.model.stats().reservable_bytes
        weight = model.model.layers[0].mlp.up_proj.weight
        new = torch.randn(weight.shape)
        edit(model.model.layers[0].mlp.up_proj, "weight", new)
        model(**inputs)
        closer._loop_thread.run(turns())
        assert closer.model.stats().reservable_bytes == available - new.nbytes


def test_an_edit_that_the_budget_cannot_hold_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder, options = reader_options(tmp_path, "llama", "direct")
    inputs = inputs_for("llama")
    with load_streamed(folder, **options) as model:
        before = model(**inputs).logits
        with pytest.raises(
            PlanError, match=r"lm_head\.weight cannot be replaced .* raise the budget"
        ):
            model.lm_head.weight.data = torch.zeros(20 << 20)
        assert bits_equal(model(**inputs).logits, before)


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "to dtype": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "to meta": lambda model: model.to("meta"),
    "layer": lambda model: model.model.layers[0].half(),
    "leaf": lambda model: model.model.layers[0].mlp.up_proj.half(),
    "share_memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_conversion_is_refused_in_one_sentence_and_leaves_the_model_as_it_was(
    conversion: str, tmp_path: Path
) -> None:
    folder, options = reader_options(tmp_path, "llama", "direct")
    inputs = inputs_for("llama")
    with load_streamed(folder, **options) as model:
        before = model(**inputs).logits
        with pytest.raises(ModelError, match=r"open the model with dtype="):
            CONVERSIONS[conversion](model)
        assert bits_equal(model(**inputs).logits, before)
        assert model.float() is model.to("cpu") is model
        assert bits_equal(model(**inputs).logits, before)


@pytest.mark.parametrize("edit", EDITS)
def test_experts_that_are_read_on_demand_cannot_be_edited(
    edit: Callable[..., None], tmp_path: Path
) -> None:
    folder, options = reader_options(tmp_path, "qwen3-moe", "direct")
    with load_streamed(folder, **options) as model:
        experts = model.model.layers[0].mlp.experts

        def compute_with_edit() -> None:
            edit(experts, "down_proj", torch.zeros(experts.down_proj.shape))
            model(**inputs_for("qwen3-moe"))

        with pytest.raises(ModelError, match="from_pretrained to change them"):
            compute_with_edit()


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "copied": lambda model, _: copy.deepcopy(model),
    "pickled": lambda model, _: pickle.dumps(model),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_would_copy_a_drop_in_is_refused_before_anything_is_done(
    name: str, tmp_path: Path
) -> None:
    folder, options = reader_options(tmp_path, "llama", "direct")
    inputs = inputs_for("llama")
    with load_streamed(folder, **options) as model:
        before = model(**inputs).logits
        with pytest.raises(ModelError, match=f"{name}.*"):
            COPIES[name](model, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        assert bits_equal(model(**inputs).logits, before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of it
def test_adapters_that_peft_injects_take_memory_of_requests_while_they_are_there(
    tmp_path: Path,
) -> None:
    folder, options = reader_options(tmp_path, "llama", "direct")
    kind = transformers.LlamaForCausalLM
    adapter = save_adapter(folder, tmp_path / "adapter", lora(r=64), model_class=kind)
    inputs = inputs_for("llama")
    expected = load_with_peft(folder, adapter, model_class=kind)(**inputs).logits
    with load_streamed(folder, **options) as model, torch.no_grad():
        stats = model._layerstream_close.model.stats
        model(**inputs)
        before = stats().reservable_bytes
        with_adapter = PeftModel.from_pretrained(model, adapter).eval()
        assert bits_equal(with_adapter(**inputs).logits, expected)
        parameters = with_adapter.named_parameters()
        added_bytes = sum(each.nbytes for name, each in parameters if "lora" in name)
        assert stats().reservable_bytes == before - added_bytes
        with_adapter.unload()
        del with_adapter, parameters
        gc.collect()
        model(**inputs)
        assert stats().reservable_bytes == before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of it
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_an_adapter_is_refused_in_one_sentence_and_leaves_the_model_as_it_was(
    merge: str, tmp_path: Path
) -> None:
    folder, options = reader_options(tmp_path, "llama", "direct")
    kind = transformers.LlamaForCausalLM
    adapter = save_adapter(folder, tmp_path / "adapter", lora(r=4), model_class=kind)
    inputs = inputs_for("llama")
    with load_streamed(folder, **options) as model, torch.no_grad():
        with_adapter = PeftModel.from_pretrained(model, adapter).eval()
        with pytest.raises(ModelError, match=r"cannot be changed in place .* from_pretrained$"):
            getattr(with_adapter, merge)()
        expected = load_with_peft(folder, adapter, model_class=kind)(**inputs).logits
        assert bits_equal(with_adapter(**inputs).logits, expected)


PARTS = {
    "a layer": lambda model: model.model.layers[0],
    "the embeddings": lambda model: model.model.embed_tokens,
    "the head": lambda model: model.lm_head,
    "a weight": lambda model: model.model.norm.weight,
    "the state": lambda model: model.state_dict(),
}


COPIED = {
    "a deep copy": copy.deepcopy,
    "a pickle": pickle.dumps,
    "a file": lambda part: torch.save(part, io.BytesIO()),
}


@pytest.mark.parametrize("way", COPIED)
@pytest.mark.parametrize("part", PARTS)
def test_a_copy_of_a_part_is_refused_in_one_sentence(part: str, way: str, tmp_path: Path) -> None:
    folder, options = reader_options(tmp_path, "llama", "direct")
    inputs = inputs_for("llama")
    with load_streamed(folder, **options) as model:
        before = model(**inputs).logits
        with pytest.raises(ModelError, match="that streams cannot be copied or pickled"):
            COPIED[way](PARTS[part](model))
        assert bits_equal(model(**inputs).logits, before)


def save_switch(folder: Path) -> Path:
    """A model that converts its routers to float32 when it computes."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_a_model_that_converts_its_modules_while_it_computes_converts_copies(
    reader: str, tmp_path: Path
) -> None:
    kind = transformers.SwitchTransformersForConditionalGeneration
    reference = kind.from_pretrained(save_switch(tmp_path / "model")).eval()
    ids = torch.arange(5, 14)[None]
    greedy = {**GREEDY, "decoder_start_token_id": 1, "input_ids": ids}
    options = {**SMALL, "budget": Budget(host="256MiB"), "reader": reader}
    with load_streamed(tmp_path / "model", **options) as model, torch.no_grad():
        router = model.encoder.block[1].layer[1].mlp.router.classifier
        for _ in range(2):
            logits = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
            expected = reference(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
            assert bits_equal(logits, expected)
            assert torch.equal(model.generate(**greedy), reference.generate(**greedy))
            assert router.weight.dtype == torch.bfloat16
        with pytest.raises(ModelError, match="open the model with dtype="):
            router.float()
