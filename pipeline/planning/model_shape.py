"""The sizes of a decoder, read from a model's config.json. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Config", "ModelShape", "shape_of", "with_text_config"]

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32_BYTES = 4

# Activation functions that torch computes in one step; others make intermediate tensors.
_ONE_STEP = {"silu", "swish", "relu", "gelu", "gelu_pytorch_tanh"}

# Linear attention processes a prompt in chunks of this many tokens.
_CHUNK_TOKENS = 64

# A config.json with more of them is not credible.
_MOST_LAYERS = 100_000

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder, in elements of ``item_bytes`` unless stated otherwise."""

    hidden: int
    heads: int
    cached: tuple[int, int]
    """What a layer caches per token: keys and values, or the latent vector that they are computed from."""
    key: int
    """Per head."""
    value: int
    """Per head."""
    intermediate: int
    """Width of the MLP; of all experts that a token is routed to, if that is more."""
    intermediates: int
    """How many tensors of that width are alive at the same time."""
    experts: int
    experts_per_token: int
    vocabulary: int
    windows: tuple[int | None, ...]
    """Per attention layer: the number of past tokens that it attends to; None: all."""
    recurrent_state: int
    """Of all recurrent layers, per sequence."""
    recurrent_scan: int
    """Of one recurrent layer, in float32 per token of the prompt."""
    chunk_tokens: int
    """Tokens that a recurrent layer computes at once; a prompt is padded to a multiple."""
    bias_span: int | None
    """Positions per token for which a relative position bias is computed; None: all. 0 without such a bias."""
    item_bytes: int

    @property
    def widest(self) -> int:
        """The width of the widest matrix of a block."""
        return max(self.hidden, self.heads * self.key, sum(self.cached), self.intermediate)


def shape_of(config: Config | None) -> ModelShape | None:
    """The shape of the decoder in ``config``; None without a hidden size or a number of layers."""
    if config is None:
        return None
    config = with_text_config(config)
    hidden = _number(config, "hidden_size", "n_embd", "d_model", "dim")
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    layers += _number(config, "num_decoder_layers", "decoder_layers")
    layers = layers or len(_layer_kinds(config) or ())
    if not hidden or not 0 < layers <= _MOST_LAYERS:
        return None
    heads = _number(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    heads = heads or _number(config, "decoder_attention_heads", "num_decoder_attention_heads") or 1
    key, value, cached = _head_widths(config, hidden, heads)
    windows, recurrent_layers = _layers(config, layers)
    state, scan = _recurrence(config, hidden) if recurrent_layers else (0, 0)
    activation = (
        config.get("hidden_act")
        or config.get("hidden_activation")
        or config.get("activation_function")
    )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    experts_per_token = _experts_per_token(config)
    return ModelShape(
        hidden=hidden,
        heads=heads,
        cached=cached,
        key=key,
        value=value,
        intermediate=_intermediate(config, hidden, experts_per_token),
        intermediates=3 if str(activation) in _ONE_STEP else 6,
        experts=_number(config, "n_routed_experts", "num_local_experts", "num_experts"),
        experts_per_token=experts_per_token,
        vocabulary=_number(config, "vocab_size"),
        windows=windows,
        recurrent_state=recurrent_layers * state,
        recurrent_scan=scan,
        chunk_tokens=_CHUNK_TOKENS if "linear_num_value_heads" in config else 1,
        bias_span=_bias_span(config),
        item_bytes=_DTYPE_BYTES.get(dtype, _FLOAT32_BYTES),
    )


def with_text_config(config: Config) -> Config:
    """``config`` with the values of its text model, if it has one, replacing its own."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def _head_widths(config: Config, hidden: int, heads: int) -> tuple[int, int, tuple[int, int]]:
    """The widths of a key and of a value, per head, and what a layer caches of both per token."""
    head = _number(config, "head_dim", "d_kv") or hidden // heads
    if latent := _number(config, "kv_lora_rank"):
        rotated = _number(config, "qk_rope_head_dim")
        key = _number(config, "qk_nope_head_dim") + rotated
        return key, _number(config, "v_head_dim"), (latent, rotated)
    kv_heads = _number(config, "num_key_value_heads", "num_kv_heads") or heads
    if config.get("new_decoder_architecture"):  # cached after they were repeated for all heads
        kv_heads = heads
    elif config.get("multi_query"):
        kv_heads = 1
    return head, head, (kv_heads * head, kv_heads * head)


def _experts_per_token(config: Config) -> int:
    return _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk")


def _intermediate(config: Config, hidden: int, experts_per_token: int) -> int:
    """The width of the MLP; of all experts that a token is routed to, if that is more."""
    dense = _number(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    expert = _number(config, "moe_intermediate_size") or dense
    shared = _number(config, "n_shared_experts") * expert
    shared += _number(config, "shared_expert_intermediate_size")
    return max(dense, experts_per_token * expert + shared)


def _layers(config: Config, layers: int) -> tuple[tuple[int | None, ...], int]:
    """The window of each attention layer, and the number of layers that keep a state instead."""
    window = _number(config, "sliding_window") or None
    if config.get("use_sliding_window") is False:
        window = None
    if (kinds := _layer_kinds(config)) is not None:
        recurrent = sum(kind in {"linear_attention", "mamba", "conv", "hybrid"} for kind in kinds)
        windows = tuple(
            window if kind == "sliding_attention" else None
            for kind in kinds
            if kind == "hybrid" or ("attention" in kind and kind != "linear_attention")
        )
        return windows, recurrent
    if "state_size" in config:
        return (), layers
    period = _number(config, "sliding_window_pattern", "_sliding_window_pattern")
    windows = tuple(
        None if period and (index + 1) % period == 0 else window for index in range(layers)
    )
    # Configs of hybrids say in many ways which layers are of which kind; assume that all are both.
    return windows, layers if "mamba_d_state" in config else 0


def _layer_kinds(config: Config) -> list[str] | None:
    kinds = config.get("layer_types", config.get("layers_block_type"))
    return [str(kind) for kind in kinds] if isinstance(kinds, list) else None


def _recurrence(config: Config, hidden: int) -> tuple[int, int]:
    """Of a recurrent layer: elements of its state per sequence, and float32 elements per token of a prompt."""
    kernel = _number(config, "conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim") or 4
    if heads := _number(config, "linear_num_value_heads"):
        key_heads = _number(config, "linear_num_key_heads")
        key, value = (
            _number(config, "linear_key_head_dim"),
            _number(config, "linear_value_head_dim"),
        )
        # The state may be kept in float32, two elements of 16 bits.
        state = 2 * heads * key * value + (2 * key_heads * key + heads * value) * kernel
        return state, heads * (4 * _CHUNK_TOKENS + 6 * (key + value))
    inner = _number(config, "intermediate_size") if "state_size" in config else 0
    inner = inner or _number(config, "mamba_num_heads") * _number(config, "mamba_head_dim")
    inner = inner or (_number(config, "expand", "mamba_expand") or 2) * hidden
    width = _number(config, "state_size", "mamba_d_state", "ssm_state_size") or 16
    state = inner * (2 * width + kernel) + 2 * _number(config, "n_groups") * width * kernel
    return state, 4 * inner * width


def _bias_span(config: Config) -> int | None:
    """See ``ModelShape.bias_span``."""
    if not _number(config, "relative_attention_num_buckets"):
        return 0
    # Blockwise attention: each block attends to itself and to its neighbours.
    radius = _number(config, "local_radius")
    return 3 * (radius + 1) if radius else None


def _number(config: Config, *names: str) -> int:
    """The first of ``names`` that is a number in ``config``; 0 if none is, or if it is negative."""
    found = (config[name] for name in names if type(config.get(name)) is int)
    return max(0, next(found, 0))
