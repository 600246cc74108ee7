"""Writes a checkpoint as GGUF in its own dtype, for llama.cpp's tools: Llama's shapes, and Qwen3's mixtures."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

from layerstream.stages.errors import ModelError

__all__ = ["describe_llama", "write_gguf"]

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
_EXPERTS = ".mlp.experts."


def describe_llama(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write the keys that Llama and what descends from it have in common."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def write_gguf(folder: Path, target: Path) -> None:
    """Write the checkpoint in ``folder``. Rows of Llama's q and k keep their order: for speed alone, not for text.

    Raises:
        ModelError: It is of another architecture.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in _ARCHITECTURES:
        raise ModelError(f"{folder} is {config['model_type']}, not one of {list(_ARCHITECTURES)}")
    architecture = _ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(str(target), gguf.MODEL_ARCH_NAMES[architecture])
    describe_llama(writer, config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if config["model_type"] == "qwen3_moe":
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    _add_tokens(writer, config["vocab_size"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in _tensors(folder):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"GGUF has no name for {name}")
        if tensor.ndim == 1 or name.endswith(".mlp.gate.weight"):  # norms, and routers
            writer.add_tensor(found, tensor.float().numpy())
        else:
            kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
            raw = tensor.contiguous().view(torch.uint8).numpy()
            kind = gguf.GGMLQuantizationType[kinds[tensor.dtype]]
            writer.add_tensor(found, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    """A tokenizer that llama.cpp loads, whose tokens mean nothing."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under their names in transformers' newest classes: experts of a layer are one tensor."""
    experts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if _EXPERTS in name:
                    layer, _, rest = name.partition(_EXPERTS)
                    number, _, part = rest.partition(".")
                    experts[f"{layer}{_EXPERTS}{part}"][int(number)] = opened.get_tensor(name)
                else:
                    yield name, opened.get_tensor(name)
    for name, parts in experts.items():
        yield name, torch.stack([parts[number] for number in sorted(parts)])
