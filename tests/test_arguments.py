"""The arguments of ``from_pretrained``: each has the effect that it has there, or is refused by name."""

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.leaks import nothing_left_behind
from support.models import inputs_for, save_model
from support.streaming import bits_equal

from layerstream.pipeline import (
    Budget,
    CheckpointError,
    ModelError,
    PlanError,
    StreamedModel,
    Workload,
    load_streamed,
)

IDS = inputs_for("llama")["input_ids"]
SMALL = {"budget": Budget(host="64MiB"), "device": "cpu", "measure": False}


def assert_loads_like_transformers(folder: Path, model_class: Any = None, **arguments: Any) -> Any:
    """Open a model and load it with transformers, with the same arguments; both must compute the same."""
    kind = model_class or transformers.LlamaForCausalLM
    torch.manual_seed(3)
    reference = kind.from_pretrained(folder, **arguments)
    torch.manual_seed(3)
    with load_streamed(folder, model_class=model_class, **arguments, **SMALL) as model:
        assert type(model).__name__ == type(reference).__name__
        with torch.no_grad():
            assert bits_equal(model(IDS).logits, reference(IDS).logits)
        ours, theirs = model.config.to_dict(), reference.config.to_dict()
        assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}
        if model.can_generate():
            assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    return reference


def other_weights(folder: Path) -> tuple[Path, Any]:
    """A model whose plain files hold other weights than those of the variant fp16 will."""
    save_model(folder, "llama")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    return folder, model


@pytest.mark.parametrize("shard", ["50GB", "40KB"], ids=["one file", "shards"])
def test_a_variant_is_what_is_read(shard: str, tmp_path: Path) -> None:
    folder, model = other_weights(tmp_path / "model")
    model.save_pretrained(folder, variant="fp16", max_shard_size=shard)
    assert_loads_like_transformers(folder, variant="fp16")
    assert_loads_like_transformers(folder)


def test_a_variant_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    with pytest.raises(CheckpointError, match=r"model\.fp16\.safetensors.*variant='fp16'"):
        load_streamed(folder, variant="fp16", **SMALL)


def test_a_subfolder_is_where_the_model_is(tmp_path: Path) -> None:
    save_model(tmp_path / "model" / "inner", "llama")
    assert_loads_like_transformers(tmp_path / "model", subfolder="inner")
    with pytest.raises(CheckpointError, match="subfolder"):
        load_streamed(tmp_path / "model", subfolder="outer", **SMALL)


def test_the_format_of_weights_can_be_chosen(tmp_path: Path) -> None:
    folder, model = other_weights(tmp_path / "model")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert_loads_like_transformers(folder, use_safetensors=False)
    assert_loads_like_transformers(folder, use_safetensors=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="use_safetensors=True"):
        load_streamed(folder, use_safetensors=True, **SMALL)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"output_attentions": True, "attn_implementation": "eager"},
        {"rms_norm_eps": 0.25},
        {"torch_dtype": torch.float16},
        {"torch_dtype": "bfloat16"},
        {"dtype": None, "device_map": None, "quantization_config": None, "max_memory": None},
        {"low_cpu_mem_usage": True, "weights_only": True, "trust_remote_code": True},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=3, num_beams=2)},
        {"local_files_only": True, "token": None, "force_download": False, "variant": None},
    ],
    ids=",".join,
)
def test_settings_have_the_effect_that_they_have_in_transformers(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    assert_loads_like_transformers(save_model(tmp_path / "model", "llama"), **settings)


def test_a_config_can_be_given_as_an_object_or_a_path(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    config = transformers.AutoConfig.from_pretrained(folder, rms_norm_eps=0.25)
    config.save_pretrained(tmp_path / "other")
    assert_loads_like_transformers(folder, config=config)
    assert_loads_like_transformers(folder, config=str(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"rms_norm_eps=.*config= was given"):
        load_streamed(folder, config=config, rms_norm_eps=0.5, **SMALL)


def test_weights_of_other_names_are_mapped_and_of_other_shapes_made_new_where_that_is_said(
    tmp_path: Path,
) -> None:
    classify = transformers.LlamaForSequenceClassification
    folder = save_model(tmp_path / "model", "llama", model=classify.__name__, pad_token_id=0)
    with pytest.raises(ModelError, match="ignore_mismatched_sizes=True"):
        load_streamed(folder, num_labels=3, **SMALL)
    reference = assert_loads_like_transformers(
        folder, classify, num_labels=3, ignore_mismatched_sizes=True
    )
    assert reference.score.weight.shape[0] == 3

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "old.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    assert_loads_like_transformers(folder, classify, key_mapping={r"^old\.": "model."})


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_an_auto_class_chooses_the_class_by_the_config(auto: str, tmp_path: Path) -> None:
    kind = {"AutoModelForCausalLM": "LlamaForCausalLM"}.get(auto, "LlamaForSequenceClassification")
    folder = save_model(tmp_path / "model", "llama", model=kind, pad_token_id=0)
    assert_loads_like_transformers(folder, getattr(transformers, auto))


@pytest.mark.parametrize(
    ("case", "auto"),
    [("bert", "AutoModel"), ("bert", "AutoModelForQuestionAnswering"), ("vit", "AutoModel")],
)
def test_weights_that_no_file_holds_are_made_new_where_that_is_said(
    case: str, auto: str, tmp_path: Path
) -> None:
    folder, kind = save_model(tmp_path / "model", case), getattr(transformers, auto)
    with pytest.raises(ModelError, match=r"lacks 2 .*initialize_missing=True"):
        load_streamed(folder, model_class=kind, **SMALL)
    torch.manual_seed(3)
    reference = kind.from_pretrained(folder)
    torch.manual_seed(3)
    options = {"model_class": kind, "initialize_missing": True, **SMALL}
    with load_streamed(folder, **options) as model, torch.no_grad():
        assert type(model).__name__ == type(reference).__name__
        inputs = inputs_for(case)
        assert all(map(bits_equal, model(**inputs).to_tuple(), reference(**inputs).to_tuple()))


REFUSED = {
    "device_map": {"model": "cpu", "lm_head": "disk"},
    "quantization_config": transformers.BitsAndBytesConfig,
    "max_memory": {"cpu": "1GiB"},
    "offload_folder": "away",
    "offload_buffers": True,
    "output_loading_info": True,
    "state_dict": {"weight": torch.ones(1)},
    "tp_plan": "auto",
    "tp_size": 2,
    "device_mesh": "mesh",
    "distributed_config": {"tp_size": 2},
    "disable_mmap": True,
    "proxies": {"https": "example.org"},
    "from_tf": True,
    "from_flax": True,
    "mirror": "tuna",
    "tqdm_class": int,
    "adapter_kwargs": {"revision": "x"},
    "adapter_name": "other",
    "no_such_setting": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    with nothing_left_behind(), pytest.raises(ModelError, match=f"{name}="):
        load_streamed(folder, **{name: REFUSED[name]}, **SMALL)


def test_every_argument_of_from_pretrained_is_known() -> None:
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    signature = inspect.signature(transformers.PreTrainedModel.from_pretrained)
    popped = [line.split('"')[1] for line in source.splitlines() if 'kwargs.pop("' in line]
    ours = inspect.getsource(inspect.getmodule(StreamedModel.open)) + (
        Path(inspect.getfile(StreamedModel)).with_name("pretrained.py").read_text()
    )
    handled_by_name = {"pretrained_model_name_or_path", "model_args", "kwargs", "_from_auto"}
    # Given to the config with the other settings, as transformers does.
    of_config = {"attn_implementation", "experts_implementation", "_from_pipeline"}
    for name in {*popped, *signature.parameters} - handled_by_name - of_config:
        assert f'"{name}"' in ours or f"{name}:" in ours, name


def test_code_of_the_models_own_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_streamed(folder, trust_remote_code=True, **SMALL)
    load_streamed(folder, **SMALL).close()


@pytest.mark.parametrize(
    "given",
    [
        {"budget": "64MiB", "device": torch.device("cpu")},
        {"budget": 64 << 20, "device_map": "cpu"},
        {"budget": {"host": "64MiB"}, "device": "cpu"},
        {"budget": "64MiB", "device_map": {"": "cpu"}},
        {"workload": {"prompt_tokens": 8, "new_tokens": 4}, "device": "cpu", "budget": "64MiB"},
    ],
    ids=str,
)
def test_budgets_workloads_and_devices_are_taken_in_plain_forms(
    given: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with StreamedModel.open(folder, measure=False, **given) as model:
            assert model.plan.device == "cpu"
            assert model.plan.host_memory.budget_bytes == 64 << 20
            if "workload" in given:
                assert model.plan.workload == Workload(prompt_tokens=8, new_tokens=4)
            await model.replan(budget="48MiB")
            assert model.plan.host_memory.budget_bytes == 48 << 20

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": {"ram": "1GiB"}}, "budget has no 'ram'"),
        ({"workload": {"tokens": 3}}, "workload has no 'tokens'"),
        ({"workload": 3}, "workload is 3"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "contradict"),
        ({"device": "cpu", "device_map": "cuda:0"}, "contradict"),
    ],
    ids=str,
)
def test_what_is_not_plain_is_refused_by_name(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    with pytest.raises((PlanError, ModelError), match=message):
        load_streamed(folder, **{"device": "cpu", "measure": False, **given})
