"""Adapters: what a streamed model computes with one is what PEFT computes with it, bit for bit, of every kind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft", reason="adapters need PEFT")

import transformers  # noqa: E402
from support.adapters import load_with_peft, lora, save_adapter  # noqa: E402
from support.models import CASES, inputs_for  # noqa: E402
from support.selection import covering  # noqa: E402
from support.traced import Save  # noqa: E402

from layerstream.pipeline import Budget, load_streamed  # noqa: E402

# PEFT's own warnings of what it is told, and of its use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"device": "cpu", "measure": False, "budget": Budget(host="64MiB"), "layer_batch_size": 1}
ATTENTION = ["q_proj", "v_proj"]

LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("llama", {}),
    "rank patterns": ("llama", {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "rank-stabilised": ("qwen3", {"use_rslora": True, "target_modules": ATTENTION}),
    "weight-decomposed": ("llama", {"use_dora": True}),
    "with biases of its own": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True} | {"lora_bias": True}),
    "with a head of its own": ("llama", {"modules_to_save": ["lm_head"]}),
    "with a head of its own beside a tied table": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "with norms of its own": ("gemma3", {"modules_to_save": ["norm"]}),
    "of an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "of a tied embedding": ("gemma3", {"target_modules": ["embed_tokens"]}),
    "of the head": ("llama", {"target_modules": ["lm_head"]}),
    "of one layer": ("qwen3", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "of a fused layer": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "of a mixture of experts": ("qwen3-moe", {"target_modules": [*ATTENTION, "o_proj"]}),
    "of a mixture with converted names": ("mixtral", {"target_modules": ATTENTION}),
    "of an encoder": ("bert", {"target_modules": ["query", "value"]}),
    "of an encoder-decoder": ("t5", {"target_modules": ["q", "v"]}),
}  # fmt: skip

KINDS: dict[str, Any] = {
    name: getattr(peft, f"{name}Config")
    for name in [
        "IA3",
        "LoHa",
        "LoKr",
        "OFT",
        "HRA",
        "FourierFT",
        "LNTuning",
        "Miss",
        "C3A",
        "Road",
        "WaveFT",
        "Gralora",
        "Hira",
        "Glora",
        "Beft",
        "Deft",
        "Peanut",
    ]
    if hasattr(peft, f"{name}Config")
}
SETTINGS = {
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LNTuning": {"target_modules": ["input_layernorm"]},
    "FourierFT": {"n_frequency": 20},
    "OFT": {"oft_block_size": 8, "r": 0},
    "C3A": {"block_size": 8},
    "WaveFT": {"n_frequency": 20},
    "Road": {"variant": "road_2", "group_size": 8},
    "Miss": {"r": 4},
    "Hira": {"r": 4},
    "Glora": {"r": 4},
    "Gralora": {"r": 4, "gralora_k": 2},
}  # fmt: skip


def class_of(case: str) -> Any:
    return getattr(transformers, CASES[case].model)


def logits(model: Any, case: str, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs_for(case, dtype), **options).logits
    return result


def assert_equals_peft(base: Path, folder: Path, case: str, dtype: torch.dtype) -> None:
    """Compare the adapter in ``folder``, and the base without it, with PEFT and transformers."""
    expected = logits(load_with_peft(base, folder, model_class=class_of(case)), case, dtype)
    without = logits(class_of(case).from_pretrained(base).eval(), case, dtype)
    assert not torch.equal(expected, without)
    with load_streamed(folder, reader="direct", **SMALL) as model:
        assert torch.equal(logits(model, case, dtype), expected)
        assert torch.equal(logits(model, case, dtype, adapter=None), without)
        assert torch.equal(logits(model, case, dtype, adapter="default"), expected)


@covering(name=list(LORAS), dtype=[torch.float32, torch.bfloat16])
def test_a_lora_computes_as_with_peft(
    save: Save, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    case, settings = LORAS[name]
    base = save(case, dtype)
    folder = save_adapter(base, tmp_path / "lora", lora(**settings), model_class=class_of(case))
    assert_equals_peft(base, folder, case, dtype)


@covering(kind=list(KINDS), dtype=[torch.float32, torch.bfloat16])
def test_other_kinds_of_adapters_compute_as_with_peft(
    save: Save, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    base = save("llama", dtype)
    config = KINDS[kind](**{"target_modules": ATTENTION} | SETTINGS.get(kind, {}))
    folder = save_adapter(base, tmp_path / "adapter", config, model_class=class_of("llama"))
    assert_equals_peft(base, folder, "llama", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_adapter_beside_its_model_applies_as_in_from_pretrained(
    save: Save, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = save("llama", dtype)
    model_class = class_of("llama")
    without = logits(model_class.from_pretrained(base).eval(), "llama", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", lora(), model_class=model_class)
    for file in adapter.iterdir():
        shutil.copy(file, base)
    expected = logits(model_class.from_pretrained(base).eval(), "llama", dtype)
    assert not torch.equal(expected, without)
    with load_streamed(base, **SMALL) as model:
        assert torch.equal(logits(model, "llama", dtype), expected)
        assert torch.equal(logits(model, "llama", dtype, adapter=None), without)


def test_an_adapter_alone_may_compute_in_16_bits(save: Save, tmp_path: Path) -> None:
    base = save("llama", torch.bfloat16)
    model_class = class_of("llama")
    folder = save_adapter(base, tmp_path / "adapter", lora(), model_class=model_class)
    for autocast in (True, False):
        with_peft = load_with_peft(
            base, folder, model_class=model_class, autocast_adapter_dtype=autocast
        )
        expected = logits(with_peft, "llama", torch.bfloat16)
        with load_streamed(folder, autocast_adapter_dtype=autocast, **SMALL) as model:
            assert torch.equal(logits(model, "llama", torch.bfloat16), expected)


def test_weights_in_torchs_format_are_read_without_running_their_pickle(
    save: Save, tmp_path: Path
) -> None:
    base = save("llama")
    folder = save_adapter(
        base, tmp_path / "adapter", lora(), model_class=class_of("llama"), safe=False
    )
    assert (folder / "adapter_model.bin").is_file()
    assert_equals_peft(base, folder, "llama", torch.float32)


def test_the_base_may_be_named_by_the_caller(save: Save, tmp_path: Path) -> None:
    base = save("llama")
    folder = save_adapter(base, tmp_path / "adapter", lora(), model_class=class_of("llama"))
    expected = logits(
        load_with_peft(base, folder, model_class=class_of("llama")), "llama", torch.float32
    )
    moved = base.rename(tmp_path / "moved")
    with load_streamed(folder, base=moved, **SMALL) as model:
        assert torch.equal(logits(model, "llama", torch.float32), expected)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_peft_may_be_used_on_the_streamed_model_itself(
    save: Save, tmp_path: Path, name: str
) -> None:
    base = save("llama")
    config = lora() if name == "lora" else peft.IA3Config(**SETTINGS["IA3"])
    folder = save_adapter(base, tmp_path / "adapter", config, model_class=class_of("llama"))
    expected = logits(
        load_with_peft(base, folder, model_class=class_of("llama")), "llama", torch.float32
    )
    with load_streamed(base, **SMALL) as model:
        wrapped = peft.PeftModel.from_pretrained(model, folder).eval()
        assert torch.equal(logits(wrapped, "llama", torch.float32), expected)
