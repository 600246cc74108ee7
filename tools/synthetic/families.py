"""Model families by name: the public ``config.json`` of each, which determines every shape."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "Config", "Family", "scaled"]

Config = dict[str, Any]

GIB = 1 << 30
MB = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model that ``make-checkpoint`` can imitate."""

    config: Config
    max_shard_bytes: int = 4 * GIB
    about: str = ""


def _llama(*, rope: Mapping[str, float] | None = None, **sizes: Any) -> Config:
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    }
    if rope is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            **rope,
        }
    return config | sizes


def _qwen3(**sizes: Any) -> Config:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 40960,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    } | sizes


def _layers(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> Config:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


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
        config=_llama(**_layers(16, 1536, 4096, 12, 4), head_dim=128, **_ENDLESS),
        max_shard_bytes=300 * MB,
        about="1.0 GB in four shards, Llama-shaped: what `layerstream demo` streams",
    ),
    "bench-3gb": Family(
        config=_llama(**_layers(24, 2048, 7168, 16, 16), head_dim=128, **_ENDLESS),
        max_shard_bytes=900 * MB,
        about="3.2 GB in four shards, Llama-shaped: what the benchmarks measure",
    ),
    "llama-3.2-1b": Family(
        config=_llama(
            **_layers(16, 2048, 8192, 32, 8),
            head_dim=64,
            rope=_LLAMA_32,
            tie_word_embeddings=True,
        )
    ),
    "llama-3.1-8b": Family(
        config=_llama(**_layers(32, 4096, 14336, 32, 8), head_dim=128, rope=_LLAMA_31)
    ),
    "llama-3.1-70b": Family(
        config=_llama(**_layers(80, 8192, 28672, 64, 8), head_dim=128, rope=_LLAMA_31)
    ),
    "llama-3.1-405b": Family(
        config=_llama(**_layers(126, 16384, 53248, 128, 8), head_dim=128, rope=_LLAMA_31)
    ),
    "qwen3-0.6b": Family(config=_qwen3(**_layers(28, 1024, 3072, 16, 8), tie_word_embeddings=True)),
    "qwen3-8b": Family(config=_qwen3(**_layers(36, 4096, 12288, 32, 8))),
    "qwen3-32b": Family(config=_qwen3(**_layers(64, 5120, 25600, 64, 8))),
    "qwen3-30b-a3b": Family(
        config=_qwen3(
            **_layers(48, 2048, 6144, 32, 4),
            architectures=["Qwen3MoeForCausalLM"],
            model_type="qwen3_moe",
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_experts=128,
            num_experts_per_tok=8,
        )
    ),
    "mixtral-8x7b": Family(
        config={
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
            **_layers(32, 4096, 14336, 32, 8),
        }
    ),
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
            **_layers(26, 1152, 6912, 4, 1),
        }
    ),
}


def scaled(config: Config, *, layers: int | None, hidden: int | None, vocab: int | None) -> Config:
    """Return ``config`` with other sizes; sizes that depend on the hidden size keep their proportion to it.

    Heads shrink to an eighth of the hidden size at most. Where fewer heads are needed, the number of queries per
    key and value stays, so that tiny models keep their kind of attention.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        config["num_hidden_layers"] = layers
    if vocab is not None:
        config["vocab_size"] = vocab
    if hidden is not None:
        before: int = config["hidden_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        queries = heads // kv_heads
        head_dim = min(config["head_dim"], max(8, hidden // 8 // 8 * 8))
        groups = heads * config["head_dim"] * hidden // (before * head_dim * queries)
        kv_heads = max(1, min(kv_heads, groups))
        while hidden % queries:  # transformers requires that the heads divide the hidden size
            queries -= 1
        while hidden % (kv_heads * queries):
            kv_heads -= 1
        config |= {
            "hidden_size": hidden,
            "head_dim": head_dim,
            "num_attention_heads": kv_heads * queries,
            "num_key_value_heads": kv_heads,
        }
        for name in ("intermediate_size", "moe_intermediate_size"):
            if name in config:
                config[name] = max(8, config[name] * hidden // before // 8 * 8)
    return config
