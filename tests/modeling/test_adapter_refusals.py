"""Adapters that cannot be honoured are refused by name, before any weight is loaded, with a remedy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft", reason="adapters need PEFT")

from support.adapters import lora, save_adapter  # noqa: E402
from support.models import save_model  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from layerstream.pipeline import Budget, CheckpointError, ModelError, load_streamed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

SMALL = {"device": "cpu", "measure": False, "budget": Budget(host="64MiB")}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, tmp_path / "adapter", lora(), model_class=LlamaForCausalLM)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "SHINY"}, "peft_type is 'SHINY', which the installed PEFT does not know"),
        ({"peft_type": "ADALORA"}, "ADALORA computes with tensors that are not saved"),
        ({"target_parameters": ["x"]}, "target_parameters is set: .* merge_and_unload"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set: .* load_streamed"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"target_modules": ["nothing"]}, "PEFT cannot put it into LlamaForCausalLM"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(
    adapter: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(adapter, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_streamed(adapter, **SMALL)
    assert str(adapter) in str(caught.value)


def test_prompt_tuning_is_refused(base: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    folder = save_adapter(base, tmp_path / "prompts", config, model_class=LlamaForCausalLM)
    with pytest.raises(
        ModelError, match="PROMPT_TUNING changes prompts, not modules; open the base"
    ):
        load_streamed(folder, **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST), "it lacks model.layers.0.self_attn.q_proj.lora_A"),
        (
            lambda tensors: tensors.update({FIRST: torch.zeros(4, 16)}),
            r"is of shape \(4, 16\), and LlamaForCausalLM takes \(4, 32\): .*another base",
        ),
        (
            lambda tensors: tensors.update(
                {FIRST.replace("layers.0", "layers.7"): torch.zeros(4, 32)}
            ),
            "its tensor model.layers.7.* has no place in LlamaForCausalLM: .*another base",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.zeros(32)}),
            "it changes model.norm.weight, a weight of the base model",
        ),
    ],
    ids=["missing", "of another shape", "of another model", "of the base itself"],
)
def test_tensors_that_do_not_fit_are_named(adapter: Path, change: Any, message: str) -> None:
    change_tensors(adapter, change)
    with pytest.raises(ModelError, match=message):
        load_streamed(adapter, **SMALL)


def test_adapters_of_two_kinds_do_not_share_a_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    other = save_adapter(base, tmp_path / "ia3", config, model_class=LlamaForCausalLM)
    with pytest.raises(ModelError, match="it is of the type IA3, and 'a' of LORA"):
        load_streamed(base, adapters={"a": adapter, "b": other}, **SMALL)


def test_a_folder_without_weights_or_without_a_base_is_refused(adapter: Path, base: Path) -> None:
    change_config(adapter, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base model: give the model as base="):
        load_streamed(adapter, **SMALL)
    change_config(adapter, base_model_name_or_path="/nowhere/else")
    with pytest.raises(CheckpointError, match=r"names the base model /nowhere/else: .*base="):
        load_streamed(adapter, **SMALL)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not the adapter's weights"):
        load_streamed(adapter, base=base, **SMALL)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_streamed(base, adapters={"a": base}, **SMALL)
    with pytest.raises(CheckpointError, match=r"base=.* is for a folder with an adapter alone"):
        load_streamed(base, base=base, **SMALL)


def test_without_peft_one_sentence_says_so(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"PEFT.* is not installed: pip install"):
        load_streamed(adapter, **SMALL)


def test_an_unknown_name_is_refused_with_the_list(base: Path, adapter: Path) -> None:
    ids = torch.ones((1, 3), dtype=torch.long)
    with load_streamed(base, adapters={"french": adapter}, **SMALL) as model:
        with pytest.raises(ModelError, match="no adapter 'german'; this model has 'french'"):
            model(ids, adapter="german")
        with pytest.raises(ModelError, match="no adapter 'german'; this model has 'french'"):
            model.generate(ids, adapter="german", max_new_tokens=1)
    with load_streamed(base, **SMALL) as model, pytest.raises(ModelError, match="has none"):
        model(ids, adapter="french")
