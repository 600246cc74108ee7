"""Model families by name: the public ``config.json`` of each, which determines every shape."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from layerstream.tools.synthetic.configs import (
    Config,
    decoder,
    deepseek_v3,
    gpt_oss,
    llama,
    mixtral,
    qwen3,
    qwen3_moe,
)

__all__ = ["FAMILIES", "Config", "Family", "scaled"]

GIB = 1 << 30
MB = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model that ``make-checkpoint`` can imitate."""

    config: Config
    max_shard_bytes: int = 4 * GIB
    about: str = ""


# Random weights sample an end token sooner or later, which would end a demo; these families have none.
_ENDLESS: Config = {
    "bos_token_id": 256,
    "eos_token_id": None,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}

_LLAMA_31 = {"factor": 8.0}
_LLAMA_32 = {"factor": 32.0}

FAMILIES: Mapping[str, Family] = {
    "demo": Family(
        config=llama(**decoder(16, 1536, 4096, 12, 4), head_dim=128, **_ENDLESS),
        max_shard_bytes=300 * MB,
        about="1.0 GB in four shards, Llama-shaped: what `layerstream demo` streams",
    ),
    "bench-3gb": Family(
        config=llama(**decoder(24, 2048, 7168, 16, 16), head_dim=128, **_ENDLESS),
        max_shard_bytes=900 * MB,
        about="3.2 GB in four shards, Llama-shaped: what the benchmarks measure",
    ),
    "bench-moe": Family(
        config=qwen3_moe(
            **decoder(24, 1024, 3072, 8, 2),
            moe_intermediate_size=320,
            **_ENDLESS | {"vocab_size": 8192},
        ),
        max_shard_bytes=1600 * MB,
        about="6.2 GB in four shards, Qwen3-MoE-shaped, 97 % experts: what benchmarks of experts measure",
    ),
    "llama-3.2-1b": Family(
        config=llama(
            **decoder(16, 2048, 8192, 32, 8),
            head_dim=64,
            rope=_LLAMA_32,
            tie_word_embeddings=True,
        )
    ),
    "llama-3.1-8b": Family(
        config=llama(**decoder(32, 4096, 14336, 32, 8), head_dim=128, rope=_LLAMA_31)
    ),
    "llama-3.1-70b": Family(
        config=llama(**decoder(80, 8192, 28672, 64, 8), head_dim=128, rope=_LLAMA_31)
    ),
    "llama-3.1-405b": Family(
        config=llama(**decoder(126, 16384, 53248, 128, 8), head_dim=128, rope=_LLAMA_31)
    ),
    "qwen3-0.6b": Family(config=qwen3(**decoder(28, 1024, 3072, 16, 8), tie_word_embeddings=True)),
    "qwen3-8b": Family(config=qwen3(**decoder(36, 4096, 12288, 32, 8))),
    "qwen3-32b": Family(config=qwen3(**decoder(64, 5120, 25600, 64, 8))),
    "qwen3-30b-a3b": Family(
        config=qwen3_moe(**decoder(48, 2048, 6144, 32, 4), moe_intermediate_size=768)
    ),
    "qwen3-235b-a22b": Family(
        config=qwen3_moe(**decoder(94, 4096, 12288, 64, 4), moe_intermediate_size=1536)
    ),
    "mixtral-8x7b": Family(config=mixtral(**decoder(32, 4096, 14336, 32, 8))),
    "gpt-oss-120b": Family(config=gpt_oss(**decoder(36, 2880, 2880, 64, 8), num_local_experts=128)),
    "deepseek-v3": Family(config=deepseek_v3(**decoder(61, 7168, 18432, 128, 128))),
    "gemma-3-1b": Family(
        config={
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "eos_token_id": [1, 106],
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "vocab_size": 262144,
            **decoder(26, 1152, 6912, 4, 1),
        }
    ),
}


def scaled(config: Config, *, layers: int | None, hidden: int | None, vocab: int | None) -> Config:
    """Return ``config`` with other sizes; sizes that depend on the hidden size keep their proportion to it.

    Heads shrink to an eighth of the hidden size at most. Where fewer heads are needed, the number of queries per
    key and value stays, so that tiny models keep their kind of attention. Mixtures keep the number of their experts
    and at least one layer that has them.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        config["num_hidden_layers"] = layers
        if "first_k_dense_replace" in config:
            config["first_k_dense_replace"] = min(config["first_k_dense_replace"], layers - 1)
        if kinds := config.get("layer_types"):
            config["layer_types"] = [kinds[layer % len(kinds)] for layer in range(layers)]
    if vocab is not None:
        config["vocab_size"] = vocab
        if (config.get("pad_token_id") or 0) >= vocab:  # transformers refuses the model
            config["pad_token_id"] = None
    if hidden is not None:
        before: int = config["hidden_size"]
        config |= {"hidden_size": hidden, **_scaled_heads(config, hidden)}
        for name in ("intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank"):
            if name in config:
                config[name] = max(8, config[name] * hidden // before // 8 * 8)
    return config


def _scaled_heads(config: Config, hidden: int) -> Config:
    """The number and the widths of attention heads for another hidden size."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width_name = "v_head_dim" if "v_head_dim" in config else "head_dim"
    width: int = config[width_name]
    queries = heads // kv_heads
    head_dim = min(width, max(8, hidden // 8 // 8 * 8))
    groups = heads * width * hidden // (config["hidden_size"] * head_dim * queries)
    kv_heads = max(1, min(kv_heads, groups))
    while hidden % queries:  # transformers requires that the heads divide the hidden size
        queries -= 1
    while hidden % (kv_heads * queries):
        kv_heads -= 1
    widths = {width_name: head_dim}
    for name in ("qk_nope_head_dim", "qk_rope_head_dim"):
        if name in config:
            widths[name] = config[name] * head_dim // width
    return {
        **widths,
        "num_attention_heads": kv_heads * queries,
        "num_key_value_heads": kv_heads,
    }
