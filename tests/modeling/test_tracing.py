"""Every weight rebuilt from its recipe equals, bit for bit, what from_pretrained loads."""

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.models import CASES, save_model

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracer_tensor import Tracer
from layerstream.pipeline.modeling.tracing import (
    TracedModel,
    load_config,
    resolve_model_class,
    trace_model,
)
from layerstream.stages.errors import ModelError

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a tiny random model as transformers does."""
    return partial(save_model, tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of a saved model."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return folder


def trace(folder: Path, model: str = "", **kwargs: Any) -> TracedModel:
    model_class = getattr(transformers, model) if model else None
    config = load_config(folder, model_class=model_class)
    return trace_model(
        Checkpoint.open(folder),
        config=config,
        model_class=resolve_model_class(config, model_class),
        **kwargs,
    )


def stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    info = checkpoint.tensors[name]
    data = bytearray(info.nbytes)
    with checkpoint.files[info.file].path.open("rb") as file:
        file.seek(info.offset)
        file.readinto(data)
    return torch.frombuffer(data, dtype=getattr(torch, info.dtype)).reshape(info.shape)


def laid_out(recipe: Recipe, sources: dict[str, torch.Tensor]) -> torch.Tensor:
    """The parameter as its pieces lay it, bytes by bytes."""
    data = bytearray()
    for piece in recipe.pieces or ():
        assert piece.offset == len(data)
        source = sources[piece.source].reshape(-1).view(torch.uint8).numpy().tobytes()
        data += source[piece.source_offset : piece.source_offset + piece.nbytes]
    octets = torch.tensor(list(data), dtype=torch.uint8)
    return octets.view(getattr(torch, recipe.dtype)).reshape(recipe.shape)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    def octets(tensor: torch.Tensor) -> torch.Tensor:
        # A clone: a single element may have any stride, and then refuses to be seen as smaller items.
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        return copy.view(-1).view(torch.uint8)

    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and torch.equal(octets(one), octets(other))
    )


def assert_as_loaded(folder: Path, model: str = "", **kwargs: Any) -> TracedModel:
    """Compare a traced model with from_pretrained's."""
    traced = trace(folder, model, **kwargs)
    checkpoint = Checkpoint.open(folder)
    loaded = type(traced.module).from_pretrained(folder, **kwargs)
    expected, found = tensors_of(loaded), tensors_of(traced.module)
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
            sources = {source: stored(checkpoint, source) for source in recipe.sources}
            value = recipe.replay(sources)
            assert tensor.is_meta
            assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
            if recipe.pieces is not None:
                assert bits_equal(laid_out(recipe, sources), expected[name])
            starts = {source.untyped_storage().data_ptr() for source in sources.values()}
            assert (recipe.scratch_bytes == 0) == (value.untyped_storage().data_ptr() in starts)
        assert bits_equal(value, expected[name]), name
    assert not traced.module.training
    assert traced.module.config.to_dict() == loaded.config.to_dict()
    assert traced.module.name_or_path == loaded.name_or_path
    if loaded.can_generate():
        assert traced.module.generation_config.to_dict() == loaded.generation_config.to_dict()
    return traced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
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


def test_a_dtype_that_is_asked_for_goes_before_the_configs(save: Save) -> None:
    assert_as_loaded(save("llama", torch.bfloat16), dtype=torch.float32)


def test_modules_that_must_stay_in_fp32_do(save: Save) -> None:
    traced = assert_as_loaded(save("t5", torch.float16))
    names = [name for name, recipe in traced.recipes.items() if recipe.dtype == "float32"]
    assert names == [name for name in traced.recipes if name.endswith("wo.weight")] != []


def test_a_config_without_a_dtype_leaves_it_to_the_weights(save: Save) -> None:
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


def test_tensors_that_the_model_has_no_use_for_are_told_not_logged(
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
    assert not any(tensor.is_inference() for tensor in tensors_of(module).values())


def test_models_may_be_traced_from_many_threads(save: Save) -> None:
    folder = save("mixtral")
    tie_weights = transformers.PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        traces = list(pool.map(trace, [folder] * 8))
    assert all(traced.recipes == traces[0].recipes for traced in traces)
    assert transformers.PreTrainedModel.tie_weights is tie_weights
    assert torch.get_default_dtype() == torch.float32


def test_a_single_file_takes_the_config_beside_it(save: Save) -> None:
    folder = save()
    traced = trace_model(
        Checkpoint.open(folder / "model.safetensors"),
        config=load_config(folder),
        model_class=transformers.LlamaForCausalLM,
    )
    assert traced.recipes == trace(folder).recipes
    assert (
        traced.module.generation_config.to_dict()
        == trace(folder).module.generation_config.to_dict()
    )


def test_the_attention_that_is_asked_for_is_used(save: Save) -> None:
    module = assert_as_loaded(save(), attn_implementation="eager").module
    assert module.config._attn_implementation == "eager"


def test_a_generation_config_is_read_from_the_folder(save: Save) -> None:
    folder = save()
    (folder / "generation_config.json").write_text('{"top_k": 7, "do_sample": true}')
    assert assert_as_loaded(folder).module.generation_config.top_k == 7


def test_without_a_generation_config_the_models_config_counts(save: Save) -> None:
    folder = save(eos_token_id=42)
    (folder / "generation_config.json").unlink()
    assert assert_as_loaded(folder).module.generation_config.eos_token_id == 42


def test_missing_tensors_are_refused_before_anything_is_allocated(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]

    folder = rewrite(save(), drop)

    def allocate(*_: Any, **__: Any) -> None:
        pytest.fail("transformers began to make up weights")

    monkeypatch.setattr(
        transformers.PreTrainedModel, "_move_missing_keys_from_meta_to_device", allocate
    )
    with pytest.raises(ModelError, match=r"lacks 6 of the 21 tensors .*model\.layers\.0\.mlp\."):
        trace(folder)


def test_a_tied_weight_that_is_stored_under_no_name_is_missing(save: Save) -> None:
    folder = rewrite(save("llama-tied"), lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ModelError, match=r"lacks 2 of .*lm_head\.weight"):
        trace(folder)


def test_a_head_that_the_checkpoint_lacks_is_not_made_up(save: Save) -> None:
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no config\.json"),
        ("{", r"config\.json is not readable as JSON"),
        ("[]", r"model of type None"),
        (
            '{"model_type": "no-such-model"}',
            r"'no-such-model', which transformers .* does not know",
        ),
        ('{"model_type": "llama", "num_attention_heads": "x"}', r"does not describe a llama model"),
    ],
    ids=["missing", "cut off", "no object", "unknown type", "nonsense"],
)
def test_a_config_that_says_nothing_useful_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["LlamaConfig"]])
def test_an_architecture_that_transformers_lacks_is_refused(
    architectures: list[str] | None,
) -> None:
    with pytest.raises(ModelError, match=r"model_class=|model class"):
        resolve_model_class(transformers.LlamaConfig(architectures=architectures))


def test_what_would_place_weights_elsewhere_is_refused(save: Save) -> None:
    with pytest.raises(ModelError, match="device_map cannot be set"):
        trace(save(), device_map="cpu")


def test_quantised_checkpoints_are_refused(save: Save) -> None:
    folder = save()
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="quantised"):
        trace(folder)


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transpose": lambda tensor: tensor.transpose(0, -1),
    "contiguous": lambda tensor: tensor.contiguous(),
    "clone": lambda tensor: tensor.clone(),
    "flatten": lambda tensor: tensor.flatten(),
    "fold": lambda tensor: tensor.reshape(2, -1),
    "unsqueeze": lambda tensor: tensor.unsqueeze(-1),
    "squeeze": lambda tensor: tensor.squeeze(),
    "rows": lambda tensor: tensor[1:],
    "columns": lambda tensor: tensor[..., :-1],
    "every other": lambda tensor: tensor[::2],
    "last": lambda tensor: tensor[-1],
    "halves swapped": lambda tensor: torch.cat(tensor.chunk(2)[::-1]),
    "columns swapped": lambda tensor: torch.cat(tensor.chunk(2, -1)[::-1], -1),
    "stacked inside": lambda tensor: torch.stack([tensor, tensor], -1),
    "stacked": lambda tensor: torch.stack([tensor, tensor.detach()]),
    "unbound": lambda tensor: torch.cat(tensor.unbind()[::-1]) if tensor.dim() > 1 else tensor,
    "padded": lambda tensor: torch.nn.functional.pad(tensor, (0, 1)),
    "unpadded": lambda tensor: torch.nn.functional.pad(tensor, (0, 0)),
    "cast": lambda tensor: tensor.to(torch.float64),
    "bytes": lambda tensor: tensor.contiguous().view(torch.int16),
    "doubled": lambda tensor: tensor * 2,
    "expanded": lambda tensor: tensor.unsqueeze(0).expand(2, *tensor.shape),
    "permuted": lambda tensor: tensor[torch.arange(tensor.shape[0]).flip(0)],
}


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=6))
def test_any_chain_of_operations_is_followed_exactly(names: list[str]) -> None:
    source = torch.arange(48, dtype=torch.float32).reshape(4, 3, 4)
    tensor: torch.Tensor = source
    tracer: torch.Tensor = Tracer.source("x", shape=source.shape, dtype=source.dtype)
    for name in names:
        try:
            result = OPERATIONS[name](tensor)
        except (RuntimeError, IndexError):
            continue  # what torch refuses is not followed either
        if result.dim():
            tensor, tracer = result, OPERATIONS[name](tracer)
    assert isinstance(tracer, Tracer)
    recipe = Recipe.of("y", tracer)
    assert bits_equal(recipe.replay({"x": source}), tensor)
    if recipe.pieces is not None:
        assert bits_equal(laid_out(recipe, {"x": source}), tensor)


def test_what_is_cut_too_finely_is_replayed() -> None:
    tracer = Tracer.source("x", shape=(5000, 2), dtype=torch.float32)
    recipe = Recipe.of("y", torch.cat([tracer[:, 1:], tracer[:, :1]], 1))
    assert recipe.pieces is None


def test_a_tensor_that_is_changed_in_place_is_changed_in_a_copy() -> None:
    tracer = Tracer.source("x", shape=(4,), dtype=torch.float32)
    before = tracer + 0
    tracer[1:].zero_()
    stored = torch.ones(4)
    assert Recipe.of("y", tracer).replay({"x": stored}).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert Recipe.of("y", before).replay({"x": stored}).tolist() == [1.0] * 4
    assert stored.tolist() == [1.0] * 4


def test_a_tensor_that_is_filled_with_random_numbers_has_no_recipe() -> None:
    tracer = Tracer.source("x", shape=(4,), dtype=torch.float32)
    tracer[1:].normal_()
    with pytest.raises(ModelError, match="random numbers into y"):
        Recipe.of("y", tracer)


def test_a_tensor_whose_data_is_set_is_made_from_what_was_set() -> None:
    tracer = Tracer.source("x", shape=(4,), dtype=torch.float32)
    tracer.data = tracer.data * 3
    assert Recipe.of("y", tracer).replay({"x": torch.ones(4)}).tolist() == [3.0] * 4
