"""The memory that a workload takes beside the weights, estimated from a model's config. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from layerstream.pipeline.plan import Workload

__all__ = ["WorkloadMemory", "estimate_memory", "workload_bytes"]

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadMemory:
    """The memory of a workload beside the weights."""

    kv_bytes: int  # KV cache of all sequences at their end, and what growing it takes on top
    prefill_bytes: int  # activations while the prompt is processed, logits included
    decode_bytes: int  # the same while one token per sequence is
    measured: bool  # by a pass on the meta device; else estimated from config.json

    @property
    def peak_bytes(self) -> int:
        """All at its worst."""
        return self.kv_bytes + max(self.prefill_bytes, self.decode_bytes)

    def scaled(self, times: int) -> Self:
        """The same for ``times`` as many sequences."""
        return replace(
            self,
            kv_bytes=times * self.kv_bytes,
            prefill_bytes=times * self.prefill_bytes,
            decode_bytes=times * self.decode_bytes,
        )


def estimate_memory(
    config: Mapping[str, Any] | None, workload: Workload | None
) -> WorkloadMemory | None:
    """Stand-in until measured."""
    if workload is None or config is None:
        return None
    total, _ = workload_bytes(config, workload)
    one, _ = workload_bytes(config, replace(workload, prompt_tokens=1))
    return WorkloadMemory(
        kv_bytes=0, prefill_bytes=total, decode_bytes=min(one, total), measured=False
    )


def workload_bytes(
    config: Mapping[str, Any] | None, workload: Workload | None
) -> tuple[int, tuple[str, ...]]:
    """Bytes of KV cache and activations, and notes on what was assumed.

    KV cache: 2 · layers · key/value heads · head size · tokens · batch · bytes of the dtype. transformers
    grows its cache by concatenation, so one layer's cache is there twice for a moment.

    Activations: while one block runs, its input, residual, normed input, attention output, queries, keys and
    values, and three times its inner width are alive, and attention scores in float32 where the kernel makes
    them (assumed not); behind the last block the logits of the last position in float32, three times over
    (logits, scores, softmax), as generation does. This is an estimate.
    """
    if workload is None or config is None:
        return 0, ()
    config = {**config, **(config.get("text_config") or {})}

    def number(*names: str, default: int) -> int:
        found = next((config[name] for name in names if isinstance(config.get(name), int)), default)
        return int(found)

    hidden = number("hidden_size", "n_embd", "d_model", "dim", default=0)
    layers = number("num_hidden_layers", "n_layer", "num_layers", default=0)
    layers += number("num_decoder_layers", "decoder_layers", default=0)
    heads = number("num_attention_heads", "n_head", "num_heads", default=1)
    kv_heads = number("num_key_value_heads", default=heads)
    head = number("head_dim", "d_kv", default=hidden // max(heads, 1))
    inner = number("intermediate_size", "n_inner", "ffn_dim", "d_ff", default=4 * hidden)
    experts = number("num_experts_per_tok", default=1)
    vocabulary = number("vocab_size", default=0)
    item = _DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), 4)

    tokens = workload.prompt_tokens + workload.new_tokens
    cache = 2 * (layers + 1) * kv_heads * head * tokens * workload.batch_size * item
    width = 6 * hidden + 2 * (heads + 2 * kv_heads) * head + 3 * inner * experts
    activations = width * workload.prompt_tokens * workload.batch_size * item
    logits = 3 * 4 * vocabulary * workload.batch_size
    note = (
        f"KV cache, activations and logits are estimated from config.json for {workload.batch_size} x "
        f"({workload.prompt_tokens} + {workload.new_tokens}) tokens"
    )
    return cache + activations + logits, (note,)
