"""Adapters over packed weights: as PEFT computes with them over what transformers unpacks, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft", reason="adapters need PEFT")

from support.adapters import lora, save_adapter  # noqa: E402
from support.gguf_models import auto_class, save_gguf_model  # noqa: E402
from support.models import save_model  # noqa: E402
from support.quantized import save_quantised  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    CompressedTensorsConfig,
    LlamaForCausalLM,
)

from layerstream.pipeline import Budget, load_streamed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and of transformers' quantisers

IDS = torch.arange(9)[None] + 1
SMALL = {"device": "cpu", "measure": False, "budget": Budget(host="64MiB"), "reader": "direct"}


def assert_equals_peft(whole: Any, path: Path, adapter: Path) -> None:
    model = peft.PeftModel.from_pretrained(whole, adapter).eval()
    with torch.no_grad(), load_streamed(path, adapters={"one": adapter}, **SMALL) as streamed:
        expected = model(IDS).logits
        assert torch.equal(streamed(IDS, adapter="one").logits, expected)
        assert not torch.equal(streamed(IDS).logits, expected)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "target_modules": ["q_proj"]}])
@pytest.mark.parametrize("quantiser", ["fp8-blocks", "int4-groups"])
def test_a_lora_over_a_quantised_checkpoint(
    tmp_path: Path, quantiser: str, settings: dict[str, Any]
) -> None:
    folder = save_quantised(tmp_path / "packed", "llama", quantiser)
    config = AutoConfig.from_pretrained(folder)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    heads = ("num_attention_heads", "num_key_value_heads")
    plain = save_model(
        tmp_path / "plain",
        "llama",
        torch.bfloat16,
        **{name: getattr(config, name) for name in (*sizes, *heads)},
    )
    adapter = save_adapter(plain, tmp_path / "lora", lora(**settings), model_class=LlamaForCausalLM)
    unpacked = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        if quantiser.startswith("int4")
        else {}
    )
    assert_equals_peft(LlamaForCausalLM.from_pretrained(folder, **unpacked), folder, adapter)


def test_a_lora_over_a_gguf_model(tmp_path: Path) -> None:
    path = save_gguf_model(tmp_path / "model.gguf", "llama")
    whole = auto_class("llama").from_pretrained(tmp_path, gguf_file=path.name)
    config = LlamaForCausalLM.config_class.from_dict(
        {**whole.config.to_dict(), "quantization_config": None}
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    adapter = save_adapter(
        tmp_path / "plain", tmp_path / "lora", lora(), model_class=LlamaForCausalLM
    )
    assert_equals_peft(whole, path, adapter)
