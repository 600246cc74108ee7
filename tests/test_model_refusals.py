"""Models, budgets and devices that cannot be used are refused with the reason, and leave nothing behind."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import save_model

from layerstream.pipeline import (
    Budget,
    CheckpointError,
    DeviceError,
    ModelError,
    PlanError,
    StreamedModel,
    load_streamed,
)
from layerstream.pipeline.entrances import NOT_SHARED, REFUSED


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def has_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def has_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def has_an_unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


def has_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lacks_a_tensor, r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"),
        (has_another_shape, r"model\.norm\.weight .*\(32,\).*\(7,\)"),
        (has_no_config, r"config\.json"),
        (has_an_unknown_type, "no-such-model"),
        (has_a_broken_config, r"config\.json"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_model_that_does_not_match_its_files_is_refused(
    damage: Any, message: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    damage(folder)

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu"):
            pass

    with nothing_left_behind(), pytest.raises((ModelError, CheckpointError), match=message):
        run(main())


def test_the_error_for_a_small_budget_says_what_is_there_and_needed_and_how_to_solve_it(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu", budget=Budget(host="1MiB")):
            pass

    with nothing_left_behind(), pytest.raises(PlanError, match=r"1 MiB .* needed .* raise the"):
        run(main())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_missing_device_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with StreamedModel.open(folder, device="cuda:0"):
            pass

    with nothing_left_behind(), pytest.raises(DeviceError, match="cuda:0 was asked for"):
        run(main())


# The public methods of a transformers model: those that run it go through requests, or are refused by name.
SHARED = {"forward", "generate", "heal_tokens", "get_compiled_call"}
# These read and write weights, in memory of requests.
BORROWING = {"push_to_hub", "resize_token_embeddings", "save_pretrained"}
RUNS_NOTHING = {
    *("active_adapters", "activation_checkpointing_disable", "activation_checkpointing_enable"),
    *("add_adapter", "add_model_tags", "adjust_generation_fn", "can_generate", "cuda"),
    *("barrier_after_gathered_checkpoint_save", "compute_transition_scores", "delete_adapter"),
    *("dequantize", "destroy_cached_continuous_batching_manager", "disable_adapters"),
    *("disable_input_require_grads", "enable_adapters", "enable_input_require_grads"),
    *("enable_peft_hotswap", "eval", "float", "from_pretrained", "get_adapter_state_dict"),
    *("get_correct_attn_implementation", "get_correct_experts_implementation", "get_decoder"),
    *("get_encoder", "get_expanded_tied_weights_keys", "get_experts_implementation", "half"),
    *("get_init_context", "get_input_embeddings", "get_memory_footprint", "get_output_embeddings"),
    *("get_parameter_or_buffer", "get_position_embeddings", "gradient_checkpointing_disable"),
    *("gradient_checkpointing_enable", "init_parallel_plans", "init_weights", "initialize_weights"),
    *("is_backend_compatible", "is_custom_code", "is_remote_code", "load_adapter", "post_init"),
    *("load_custom_generate", "mark_tied_weights_as_initialized", "maybe_distribute_model"),
    *("named_non_persistent_buffers", "num_parameters", "prepare_distribute_model"),
    *("prepare_inputs_for_generation", "register_for_auto_class", "resize_position_embeddings"),
    *("retrieve_modules_from_names", "set_adapter", "set_attn_implementation", "set_decoder"),
    *("set_encoder", "set_experts_implementation", "set_input_embeddings", "tie_weights", "to"),
    *("set_output_embeddings", "set_use_kernels", "should_save_on_this_rank", "train"),
    "warn_if_padding_and_no_attention_mask",
}


def public_methods(kind: type[Any]) -> set[str]:
    """The methods that transformers, not torch, gives a class."""
    return {
        name
        for base in kind.__mro__
        if base.__module__.startswith("transformers")
        for name in vars(base)
        if not name.startswith("_")
        and callable(getattr(kind, name))
        and not name.endswith("_class")
    }


def test_every_method_of_a_transformers_model_that_can_run_it_is_known() -> None:
    found = public_methods(transformers.LlamaForCausalLM)
    assert {"generate", "generate_batch"} <= found
    assert found - SHARED - BORROWING - RUNS_NOTHING <= REFUSED.keys()
    assert found >= NOT_SHARED.keys()


@pytest.mark.parametrize("as_dropin", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_share_or_would_copy_is_refused_by_name(
    name: str, as_dropin: bool, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    ids = torch.tensor([[3, 4, 5]])

    def refuses(module: Any) -> None:
        before = module(ids).logits
        with pytest.raises(ModelError, match=f"{name} does not work on a streamed LlamaFor"):
            getattr(module, name)([[3, 4], [5]])
        assert torch.equal(module(ids).logits, before)

    async def main() -> None:
        async with StreamedModel.open(folder, device="cpu", measure=False) as model:
            await asyncio.to_thread(refuses, model.module)

    if as_dropin:
        with load_streamed(folder, device="cpu", measure=False) as model:
            refuses(model)
    else:
        run(main())


def compiled(model: Any) -> Any:
    return torch.compile(model)


def compiled_layer(model: Any) -> Any:
    layer = torch.compile(model.model.layers[0])
    return lambda _: layer(torch.zeros(1, 3, 32))


def compiled_by_transformers(model: Any) -> Any:
    return model.get_compiled_call(transformers.CompileConfig())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, once
@pytest.mark.parametrize("compile_", [compiled, compiled_layer, compiled_by_transformers])
def test_compiled_code_is_refused_and_leaves_the_model_usable(
    compile_: Any, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    ids = torch.tensor([[3, 4, 5]])
    with load_streamed(folder, device="cpu", measure=False) as model:
        before = model(ids).logits
        with pytest.raises(ModelError, match=r"(cannot be compiled|compile_config=).*come and go"):
            compile_(model)(ids)
        assert torch.equal(model(ids).logits, before)
        # What generate compiles unasked is called as it is.
        assert torch.equal(model.get_compiled_call(None)(ids).logits, before)


def test_a_paged_cache_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    ids = torch.tensor([[3, 4, 5]])
    with load_streamed(folder, device="cpu", measure=False) as model:
        with pytest.raises(ModelError, match=r'^cache_implementation="paged" does not work'):
            model.generate(ids, max_new_tokens=2, cache_implementation="paged")
        assert model.generate(ids, max_new_tokens=2).shape == (1, 5)
