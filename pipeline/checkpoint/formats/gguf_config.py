"""What the metadata of a GGUF file say of the model, in the words of a config.json."""

from collections.abc import Mapping
from typing import Any

__all__ = ["config_of", "part_of"]

# GGUF's names, which are the same for all architectures, behind the architecture's: "llama.block_count".
_NAMES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.kv_lora_rank": "kv_lora_rank",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def config_of(metadata: Mapping[str, Any], tensor_names: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the model, as far as its metadata state them; those per layer are the largest.

    It is for planning without transformers, which reads the metadata itself to build a model.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        return {}
    own = {
        name.removeprefix(f"{architecture}."): value
        for name, value in metadata.items()
        if name.startswith(f"{architecture}.")
    }
    config: dict[str, Any] = {"model_type": architecture}
    for name, theirs in _NAMES.items():
        number = _number(own.get(name))
        if number is not None:
            config[theirs] = number
    tokens = getattr(metadata.get("tokenizer.ggml.tokens"), "length", None)
    if tokens is not None:
        config.setdefault("vocab_size", tokens)
    # A model in several files has its metadata in the first one, and this tensor maybe in another: whoever looks at
    # the flag looks for the tensor as well.
    config["tie_word_embeddings"] = "output.weight" not in tensor_names
    return config | _windows(own, config) | _latents(own) | _states(own)


def part_of(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """See ``Header.part``."""
    number, count = metadata.get("split.no"), metadata.get("split.count")
    if type(number) is not int or type(count) is not int or count < 1:
        return None
    return number, count


def _windows(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding window, if it is stated which layers have it; else all are taken to attend to everything."""
    window, pattern = (
        _number(own.get("attention.sliding_window")),
        own.get("attention.sliding_window_pattern"),
    )
    if window is None or pattern is None:
        return {}
    if isinstance(pattern, list) and len(pattern) >= config.get("num_hidden_layers", 0):
        kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        return {"sliding_window": window, "layer_types": kinds[: config.get("num_hidden_layers")]}
    if type(pattern) is int:
        return {"sliding_window": window, "sliding_window_pattern": pattern}
    return {}


def _latents(own: Mapping[str, Any]) -> dict[str, Any]:
    """The widths of heads whose keys and values are computed from a latent vector."""
    if "attention.kv_lora_rank" not in own:
        return {}
    rotated = _number(own.get("rope.dimension_count")) or 0
    key = _number(own.get("attention.key_length_mla", own.get("attention.key_length"))) or rotated
    value = _number(own.get("attention.value_length_mla", own.get("attention.value_length")))
    return {
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value or key - rotated,
    }


def _states(own: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of recurrent layers: all of them without heads of attention, else any of them."""
    state = _number(own.get("ssm.state_size"))
    if state is None:
        return {}
    sizes = {"conv_kernel": own.get("ssm.conv_kernel"), "n_groups": own.get("ssm.group_count")}
    if _number(own.get("attention.head_count")):
        return {**sizes, "mamba_d_state": state}
    return {**sizes, "state_size": state, "intermediate_size": own.get("ssm.inner_size")}


def _number(value: Any) -> int | None:
    """A number, or the largest of one per layer."""
    if isinstance(value, list):
        value = max((each for each in value if type(each) is int), default=None)
    return value if type(value) is int else None
