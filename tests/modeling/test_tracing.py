"""Every weight rebuilt from its recipe equals, bit for bit, what from_pretrained loads."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import CASES
from support.selection import covering
from support.traced import Save, equal_with_strides, join_pieces, rewrite, trace

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.config import load_config
from layerstream.pipeline.modeling.tracing import TracedModel, trace_model


def read_stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    info = checkpoint.tensors[name]
    data = bytearray(info.nbytes)
    with checkpoint.files[info.file].path.open("rb") as file:
        file.seek(info.offset)
        file.readinto(data)
    return torch.frombuffer(data, dtype=getattr(torch, info.dtype)).reshape(info.shape)


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def assert_as_loaded(folder: Path, model: str = "", **kwargs: Any) -> TracedModel:
    """Compare a traced model with from_pretrained's."""
    traced = trace(folder, model, **kwargs)
    checkpoint = Checkpoint.open(folder)
    loaded = type(traced.module).from_pretrained(folder, **kwargs)
    expected, found = named_tensors(loaded), named_tensors(traced.module)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if name in traced.aliases:
            assert tensor is found[traced.aliases[name]]
            assert expected[name] is expected[traced.aliases[name]]
            continue
        assert isinstance(tensor, torch.nn.Parameter) == isinstance(
            expected[name], torch.nn.Parameter
        )
        value = tensor
        if name in traced.recipes:
            recipe = traced.recipes[name]
            sources = {source: read_stored(checkpoint, source) for source in recipe.sources}
            value = recipe.replay(sources)
            assert tensor.is_meta
            assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
            if recipe.pieces is not None:
                assert equal_with_strides(join_pieces(recipe, sources), expected[name])
            starts = {source.untyped_storage().data_ptr() for source in sources.values()}
            assert (recipe.scratch_bytes == 0) == (value.untyped_storage().data_ptr() in starts)
        assert equal_with_strides(value, expected[name]), name
    assert not traced.module.training
    assert traced.module.config.to_dict() == loaded.config.to_dict()
    assert traced.module.name_or_path == loaded.name_or_path
    if loaded.can_generate():
        assert traced.module.generation_config.to_dict() == loaded.generation_config.to_dict()
    return traced


@covering(case=list(CASES), dtype=[torch.float32, torch.bfloat16])
def test_every_weight_is_what_from_pretrained_loads(
    save: Save, case: str, dtype: torch.dtype
) -> None:
    traced = assert_as_loaded(save(case, dtype))
    assert type(traced.module) is getattr(transformers, CASES[case].model)
    assert traced.unused == ()


def test_weights_that_are_stored_as_they_are_used_are_views(save: Save) -> None:
    recipes = trace(save("llama", torch.bfloat16)).recipes.values()
    assert all(len(recipe.pieces or ()) == 1 and not recipe.scratch_bytes for recipe in recipes)


def test_fused_experts_are_pieces_in_the_order_of_the_experts(save: Save) -> None:
    recipe = trace(save("mixtral")).recipes["model.layers.0.mlp.experts.gate_up_proj"]
    prefix = "model.layers.0.block_sparse_moe.experts."
    names = [piece.source.removeprefix(prefix) for piece in recipe.pieces or ()]
    assert names == [f"{expert}.{half}.weight" for expert in range(4) for half in ("w1", "w3")]
    assert recipe.scratch_bytes >= sum(piece.nbytes for piece in recipe.pieces or ())


def test_weights_of_another_precision_are_cast(save: Save) -> None:
    folder = save("llama", torch.float32)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    traced = assert_as_loaded(folder)
    assert all(recipe.pieces is None for recipe in traced.recipes.values())


def test_a_requested_dtype_takes_precedence_over_the_configs(save: Save) -> None:
    assert_as_loaded(save("llama", torch.bfloat16), dtype=torch.float32)


def test_modules_that_must_stay_in_fp32_do(save: Save) -> None:
    traced = assert_as_loaded(save("t5", torch.float16))
    names = [name for name, recipe in traced.recipes.items() if recipe.dtype == "float32"]
    assert names == [name for name in traced.recipes if name.endswith("wo.weight")] != []


def test_without_a_dtype_in_the_config_that_of_the_weights_is_used(save: Save) -> None:
    folder = save("llama", torch.bfloat16)
    settings = json.loads((folder / "config.json").read_text())
    del settings["dtype"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert_as_loaded(folder)


def test_a_base_models_checkpoint_serves_the_model_with_a_head(save: Save) -> None:
    assert_as_loaded(save("gpt2", model="GPT2Model"), "GPT2LMHeadModel")


def test_a_checkpoint_with_a_head_serves_the_base_model(save: Save) -> None:
    traced = assert_as_loaded(save("llama"), "LlamaModel")
    assert traced.unused == ("lm_head.weight",)


def test_a_part_of_a_larger_model_reads_its_own_part_of_the_config(save: Save) -> None:
    traced = assert_as_loaded(save("clip"), "CLIPTextModel")
    assert any(name.startswith("vision_model.") for name in traced.unused)


def test_a_tied_weight_may_be_stored_under_its_other_name(save: Save) -> None:
    folder = rewrite(
        save("llama-tied"),
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}
        ),
    )
    traced = assert_as_loaded(folder)
    assert traced.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert traced.recipes["model.embed_tokens.weight"].sources == ("lm_head.weight",)


def test_a_tied_weight_that_is_stored_twice_is_taken_from_both(
    save: Save, caplog: pytest.LogCaptureFixture
) -> None:
    folder = rewrite(
        save("llama-tied"),
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
        ),
    )
    with caplog.at_level(logging.WARNING):
        traced = trace(folder)
    assert not caplog.records
    assert not traced.aliases
    assert traced.recipes["lm_head.weight"].sources == ("lm_head.weight",)


def test_tensors_that_the_model_does_not_use_are_reported_not_logged(
    save: Save, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = rewrite(save(), lambda tensors: tensors.update(extra=torch.zeros(3)))
    capfd.readouterr()
    assert trace(folder).unused == ("extra",)
    assert capfd.readouterr() == ("", "")


def test_the_callers_progress_bars_stay_as_they_were(save: Save) -> None:
    from transformers.utils import logging as hf_logging

    folder = save()
    drawn: list[Any] = []

    def draw(factory: Any, args: Any, kwargs: Any) -> Any:
        drawn.append(kwargs)
        return factory(*args, **kwargs)

    hf_logging.set_tqdm_hook(draw)
    try:
        trace(folder)
        assert not drawn
        assert hf_logging.set_tqdm_hook(None) is draw
    finally:
        hf_logging.set_tqdm_hook(None)


def test_tracing_inside_inference_mode_leaves_ordinary_parameters(save: Save) -> None:
    folder = save()
    with torch.inference_mode(), torch.device("meta"):
        module = trace(folder).module
    assert not any(tensor.is_inference() for tensor in named_tensors(module).values())


def test_models_may_be_traced_from_many_threads(save: Save) -> None:
    folder = save("mixtral")
    tie_weights = transformers.PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        traces = list(pool.map(trace, [folder] * 8))
    assert all(traced.recipes == traces[0].recipes for traced in traces)
    assert transformers.PreTrainedModel.tie_weights is tie_weights
    assert torch.get_default_dtype() == torch.float32


def test_a_single_file_takes_the_config_of_its_folder(save: Save) -> None:
    folder = save()
    traced = trace_model(
        Checkpoint.open(folder / "model.safetensors"),
        config=load_config(folder)[0],
        model_class=transformers.LlamaForCausalLM,
    )
    assert traced.recipes == trace(folder).recipes
    assert (
        traced.module.generation_config.to_dict()
        == trace(folder).module.generation_config.to_dict()
    )


def test_the_requested_attention_is_used(save: Save) -> None:
    module = assert_as_loaded(save(), attn_implementation="eager").module
    assert module.config._attn_implementation == "eager"


def test_a_generation_config_is_read_from_the_folder(save: Save) -> None:
    folder = save()
    (folder / "generation_config.json").write_text('{"top_k": 7, "do_sample": true}')
    assert assert_as_loaded(folder).module.generation_config.top_k == 7


def test_without_a_generation_config_the_models_config_is_used(save: Save) -> None:
    folder = save(eos_token_id=42)
    (folder / "generation_config.json").unlink()
    assert assert_as_loaded(folder).module.generation_config.eos_token_id == 42
