"""Tiny random models of many architectures as GGUF files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from torch import device, nn
from transformers import modeling_gguf_pytorch_utils as transformers_gguf
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from layerstream.tools.synthetic.byte_tokenizer import BOS, EOS, PAD, tokenizer_files
from support.ggufs import write_gguf

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0

BLOCK = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GROUPED = {**BLOCK, "intermediate_size": 96, "num_key_value_heads": 2}
ROUTED = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}

HYBRID = {
    **GROUPED, "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                        "partial_rotary_factor": 0.5, "rope_type": "default"},
}  # fmt: skip

# Sizes that transformers does not take from the file are those of its defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, "head_dim": 16}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2moe": ("Qwen2MoeConfig", ROUTED),
    "qwen3": ("Qwen3Config", GROUPED),
    "qwen3moe": ("Qwen3MoeConfig", {**ROUTED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16}),
    "phi3": ("Phi3Config", {**GROUPED, "vocab_size": 32064}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "falcon": ("FalconConfig", BLOCK),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "stablelm": ("StableLmConfig", {**GROUPED, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "nemotron": ("NemotronConfig", {**GROUPED, "head_dim": 16}),
    "mamba": (
        "MambaConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 96},
    ),
    "t5": (
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 96,
         "feed_forward_proj": "gated-gelu"},
    ),
    "minimax-m2": (
        "MiniMaxM2Config",
        {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    ),
    "lfm2": (
        "Lfm2Config",
        {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "qwen35": ("Qwen3_5TextConfig", HYBRID),
    "qwen35moe": (
        "Qwen3_5MoeTextConfig",
        {**HYBRID, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32},
    ),
}  # fmt: skip

# GGUF's name of the architecture -> transformers' name in its tables.
_THEIRS = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2"}


def save_gguf_model(
    path: Path,
    architecture: str,
    *,
    kind: gguf.GGMLQuantizationType = Q8_0,
    seed: int = 0,
    changes: dict[str, Any] | None = None,
    told: dict[str, int] | None = None,
    without: str | None = None,
    blocks: Callable[..., np.ndarray] | None = None,
    tokens: Callable[[gguf.GGUFWriter], Any] | None = None,
    **options: Any,
) -> Path:
    """Write a tiny random model; matrices with whole blocks are stored as ``kind``, all else as float32.

    Args:
        path: The file.
        architecture: A key of ``MODELS``.
        kind: How most matrices are stored.
        seed: Of the weights.
        changes: Settings of the config.
        told: Metadata that say something else.
        without: A tensor to leave out.
        tokens: Writes the tokenizer; by default there are only names of tokens.
        blocks: (kind, rows, columns) -> blocks that are taken instead of random numbers.
        options: Of ``GGUFWriter``.
    """
    class_name, settings = MODELS[architecture]
    config = getattr(transformers, class_name)(**{**settings, **(changes or {})})
    with device("meta"):
        model = auto_class(architecture).from_config(config)
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in _shapes(model, architecture):
        values = random.standard_normal(shape, np.float32) * 0.1 + ("norm" in name)
        if "ssm_a" in name:
            values = -np.abs(values) - 0.01
        whole = len(shape) > 1 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        if whole and blocks and gguf.GGML_QUANT_SIZES[kind][0] > 1:
            values = blocks(kind, int(np.prod(shape[:-1])), shape[-1]).reshape(*shape[:-1], -1)
        else:
            values = values.astype(np.float32)
        tensors[name] = values, kind if whole else F32
    tensors.pop(without, None)
    return write_gguf(
        path,
        tensors,
        architecture=architecture,
        describe=lambda writer: _describe(writer, architecture, config, told or {}, tokens),
        **options,
    )


def auto_class(architecture: str) -> Any:
    """The class of transformers that loads a model of ``architecture``."""
    return (
        transformers.AutoModelForSeq2SeqLM
        if architecture == "t5"
        else transformers.AutoModelForCausalLM
    )


def _shapes(  # noqa: C901 - an architecture here and there is different
    model: nn.Module, architecture: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the tensors that llama.cpp's converter makes of ``model``."""
    processor = transformers_gguf.TENSOR_PROCESSORS.get(
        architecture, transformers_gguf.TensorProcessor
    )(config={})
    hybrid = architecture.startswith("qwen35")  # which has no name in the table of the older loader
    names = transformers_gguf.get_gguf_hf_weights_map(
        model, processor, model_type=architecture if hybrid else None
    )
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, theirs in names.items():
        shape = list(model.state_dict()[theirs].shape)
        if name == "output.weight" and tied:
            continue
        if name.endswith("ssm_a") and hybrid:
            yield f"{name.removesuffix('ssm_a')}ssm_dt.bias", tuple(shape)
        if name.endswith("ffn_gate_up_exps"):
            for half in ("gate", "up"):
                half_name = name.replace("gate_up", half)
                yield f"{half_name}.weight", (shape[0], shape[1] // 2, shape[2])
            continue
        if "_exps" in name:
            name = f"{name}.weight"  # noqa: PLW2901
            if "gate" in name or "up" in name:
                shape[1] //= 2
        if "conv1d.weight" in name or "shortconv.conv.weight" in name:
            shape = [shape[0], shape[2]]
        if "ffn_gate_inp_shexp" in name:
            shape = shape[1:]
        if architecture == "gpt2" and any(
            part in name for part in ("attn_qkv.weight", "attn_output.weight", "ffn_down.weight", "ffn_up.weight")
        ):  # fmt: skip
            shape = shape[::-1]
        yield name, tuple(shape)


def _describe(  # noqa: C901 - see above
    writer: gguf.GGUFWriter,
    architecture: str,
    config: Any,
    told: dict[str, int],
    tokens: Callable[[gguf.GGUFWriter], Any] | None,
) -> None:
    theirs = _THEIRS.get(architecture, architecture)
    if architecture == "lfm2":  # of whose keys transformers' newer loader has its own table
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if architecture.startswith("qwen35"):
        _describe_hybrid(writer, architecture, config)
    for key, attribute in GGUF_CONFIG_MAPPING.get(theirs, {}).items():
        value = getattr(config, attribute, None) if attribute else None
        if attribute in {"rope_theta", "head_dim"} and value is None:
            value = {"rope_theta": 10000.0, "head_dim": config.hidden_size // 4}[attribute]
        if architecture == "lfm2" and key == "attention.head_count_kv":
            value = [value * (kind == "full_attention") for kind in config.layer_types]
        value = told.get(f"{architecture}.{key}", value)
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
    if tokens:
        tokens(writer)
    else:
        writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])


def _describe_hybrid(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "full_attention_interval": 4,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "rope.dimension_count": config.head_dim // 2,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
    }  # fmt: skip
    for key, value in numbers.items():
        if value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_sections([2, 1, 1, 0])


def byte_tokens(writer: gguf.GGUFWriter) -> None:
    """Write the tokenizer of the 256 bytes, three special tokens and "ab", with a chat template."""
    model = tokenizer_files()["tokenizer.json"]["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*model["vocab"], "ab"])
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]
    )
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}{% endfor %}")
