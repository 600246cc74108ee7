"""The memory of a workload besides the weights, estimated from a model's config. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerstream.pipeline.planning.plan import Workload

__all__ = [
    "Config",
    "Widths",
    "WorkloadMemory",
    "estimate_memory",
    "kv_bytes",
    "widths_of",
    "with_text_config",
    "workload_bytes",
]

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4

# Choosing a token by top-p: logits, sorted ones, softmax and its running sum in float32, and the order in int64.
_SAMPLING_BYTES = 24

# Activation functions that torch computes in one step; others make intermediate tensors.
_ONE_STEP = {"silu", "swish", "relu", "gelu", "gelu_pytorch_tanh"}

# Memory of a process for activations, divided by what is alive: glibc keeps freed blocks in the thread's heap. 1.1 to 1.9
# times was measured for dense models, with sequences of 128 to 2048 tokens; caching allocators of GPUs round and split.
_WASTE = 2

# Linear attention processes a prompt in pieces of this many tokens.
_CHUNK_TOKENS = 64

# Finding the bucket of each pair of positions that are apart by so much: six tensors of int64, and what holds of which.
_BUCKET_BYTES = 50

# A config.json with more of them is not credible.
_MOST_LAYERS = 100_000

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadMemory:
    """The memory of a workload besides the weights, in bytes."""

    kv_bytes: int
    """KV cache (or a recurrent model's state) of all sequences, after the last token."""
    # The most besides the cache while the prompt is processed, including logits.
    prefill_bytes: int
    # The same while each sequence gets one more token, including the growth of the cache.
    decode_bytes: int
    measured: bool
    """In a pass on the meta device; otherwise estimated from the config."""

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at any time."""
        return self.kv_bytes + max(self.prefill_bytes, self.decode_bytes)

    @property
    def reserved_bytes(self) -> int:
        """The most that a process takes for it, including the overhead of allocators."""
        return self.kv_bytes + _WASTE * max(self.prefill_bytes, self.decode_bytes)

    @property
    def spare_bytes(self) -> int:
        """The part of that which is free while no prompt is processed."""
        return _WASTE * max(0, self.prefill_bytes - self.decode_bytes)

    def scaled(self, times: int) -> "WorkloadMemory":
        """The same for ``times`` as many sequences."""
        return WorkloadMemory(
            kv_bytes=times * self.kv_bytes,
            prefill_bytes=times * self.prefill_bytes,
            decode_bytes=times * self.decode_bytes,
            measured=self.measured,
        )


def estimate_memory(config: Config | None, workload: Workload) -> WorkloadMemory | None:
    """Estimate the memory of ``workload`` in the model that ``config`` (a config.json) describes.

    The cache is exact for attention that transformers caches by heads: grouped, sliding, latent. Activations are an
    estimate: those of the largest step of a block, with attention scores only if no fused kernel supports the heads.

    Returns:
        None if ``config`` lacks sizes.
    """
    sizes = _sizes(config)
    if sizes is None:
        return None
    batch, prompt = workload.batch_size, workload.prompt_tokens
    tokens = prompt + workload.new_tokens
    cached = _cached_bytes(sizes, batch, tokens)
    # While a layer's keys grow by concatenation, they exist twice.
    growing = batch * tokens * max(sizes.rows) * sizes.item_bytes if sizes.windows else 0
    logits = batch * sizes.vocabulary * (sizes.item_bytes + _SAMPLING_BYTES)
    prefill = max(_activation_bytes(sizes, batch, prompt, prompt), logits)
    # A sliding window keeps all of the prompt until the next token.
    prefill += max(0, _cached_bytes(sizes, batch, prompt, slides=False) - cached)
    return WorkloadMemory(
        kv_bytes=cached,
        prefill_bytes=prefill,
        decode_bytes=growing + max(_activation_bytes(sizes, batch, 1, tokens), logits),
        measured=False,
    )


def kv_bytes(config: Config, *, batch_size: int, tokens: int) -> int:
    """Bytes of the KV cache, or of a recurrent model's state, for ``batch_size`` sequences of ``tokens``.

    0 if ``config`` lacks sizes.
    """
    sizes = _sizes(config)
    return 0 if sizes is None else _cached_bytes(sizes, batch_size, tokens)


def workload_bytes(config: Config | None, workload: Workload | None) -> tuple[int, tuple[str, ...]]:
    """The memory to reserve by ``estimate_memory``, and notes on assumptions."""
    if workload is None or config is None:
        return 0, ()
    memory = estimate_memory(config, workload)
    if memory is None:
        return 0, ("config.json tells no sizes, so nothing is reserved for the workload",)
    note = (
        f"KV cache, activations and logits are estimated from config.json for {workload.batch_size} x "
        f"({workload.prompt_tokens} + {workload.new_tokens}) tokens"
    )
    return memory.reserved_bytes, (note,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """The widths of a decoder's matrices, in elements of ``item_bytes``."""

    widest: int
    """Of all in its blocks."""
    vocabulary: int
    item_bytes: int


def widths_of(config: Config | None) -> Widths | None:
    """The widths in the model that ``config`` (a config.json) describes; None if it lacks sizes."""
    sizes = _sizes(config)
    if sizes is None:
        return None
    widest = max(sizes.hidden, sizes.heads * sizes.key, sum(sizes.rows), sizes.inner)
    return Widths(widest=widest, vocabulary=sizes.vocabulary, item_bytes=sizes.item_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The sizes of a decoder, in elements unless stated otherwise."""

    hidden: int
    heads: int
    # What a layer caches of a token: keys and values, or the latent vector that they are computed from.
    rows: tuple[int, int]
    key: int
    """Per head."""
    value: int
    inner: int
    """Of all experts that a token is routed to."""
    inners: int
    """How many tensors of that width are alive at the same time."""
    experts: int
    experts_per_token: int
    vocabulary: int
    windows: tuple[int | None, ...]
    """Per attention layer: how many tokens it looks back; None: all."""
    state: int
    """Of all recurrent layers, per sequence."""
    scan: int
    """Of a recurrent layer, in float32 per token of the prompt."""
    piece: int
    """Tokens that it computes at once; a prompt is padded to a multiple."""
    # How many tokens a bias on relative positions is computed for, per token; None: all. 0 if there is no such bias.
    biased: int | None
    item_bytes: int


def _cached_bytes(sizes: _Sizes, batch: int, tokens: int, *, slides: bool = True) -> int:
    spans = sum(
        min(tokens, window) if window is not None and slides else tokens for window in sizes.windows
    )
    return batch * (spans * sum(sizes.rows) + sizes.state) * sizes.item_bytes


def _activation_bytes(sizes: _Sizes, batch: int, tokens: int, seen: int) -> int:
    """The most that is alive while a block computes ``tokens`` new ones of ``seen`` tokens per sequence."""
    item, hidden, heads = sizes.item_bytes, sizes.hidden, sizes.heads
    queries, kept = heads * sizes.key, sum(sizes.rows)
    norm = hidden * (2 * item + 3 * _FLOAT32)
    # Input, residual; queries and keys before and after rotation, and intermediate tensors of it.
    attention = (2 * hidden + 4 * queries + 3 * kept + heads * sizes.value) * item
    # Gate, up and their product; a mixture of experts repeats its input for each expert of a token.
    routed = sizes.experts_per_token
    inner = (3 * hidden + sizes.inners * sizes.inner) * item
    if routed:  # their product exists besides both of them
        inner += (3 * routed * hidden + sizes.inner) * item + 4 * sizes.experts * _FLOAT32
    scan = 2 * hidden * item + sizes.scan * _FLOAT32
    per_token = max(norm, attention, inner, scan)
    scores = 0
    if sizes.key != sizes.value:
        # No fused CPU kernel supports these: scores and weights in float32, keys and values for all heads.
        scores = heads * tokens * seen * (2 * _FLOAT32 + item)
        scores += 2 * heads * seen * (sizes.key + sizes.value) * (item + _FLOAT32)
    # If sequences of a batch differ in length, or not all tokens are attended to: masks, one of them as numbers, and
    # keys and values for all heads.
    masks = 0
    if batch > 1 or any(window is not None and tokens > window for window in sizes.windows):
        masks = tokens * seen * (2 + item) + seen * heads * (sizes.key + sizes.value) * item
    bias = 0
    if sizes.biased != 0:
        # For all sequences, and with the mask added to it for each; if some are shorter, the mask as numbers, too.
        pairs = tokens * min(seen, sizes.biased or seen)
        added = (2 * batch if batch > 1 else 1) * heads * item
        bias = pairs * max(_BUCKET_BYTES, heads * item + added)
    if tokens > 1:
        tokens = -(-tokens // sizes.piece) * sizes.piece
    return batch * tokens * per_token + max(batch * max(scores, masks), bias)


def _sizes(config: Config | None) -> _Sizes | None:
    """The sizes of the decoder in ``config``; None without a hidden size or a number of layers."""
    if config is None:
        return None
    config = with_text_config(config)
    hidden = _number(config, "hidden_size", "n_embd", "d_model", "dim")
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    layers += _number(config, "num_decoder_layers", "decoder_layers")
    if not hidden or not 0 < layers <= _MOST_LAYERS:
        return None
    heads = _number(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    heads = heads or _number(config, "decoder_attention_heads") or 1
    head = _number(config, "head_dim", "d_kv") or hidden // heads
    key, value = head, head
    kv_heads = _kv_heads(config) or heads
    latent = _number(config, "kv_lora_rank")
    if latent:
        key = _number(config, "qk_nope_head_dim") + _number(config, "qk_rope_head_dim")
        value = _number(config, "v_head_dim")
    routed = _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    experts = _number(config, "n_routed_experts", "num_local_experts", "num_experts")
    dense = _number(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    expert = _number(config, "moe_intermediate_size") or dense
    activation = (
        config.get("hidden_act")
        or config.get("hidden_activation")
        or config.get("activation_function")
    )
    shared = _number(config, "n_shared_experts") * expert
    shared += _number(config, "shared_expert_intermediate_size")
    attends, recurrent = _layers(config, layers)
    state, scan = _recurrence(config, hidden) if recurrent else (0, 0)
    row = (
        (latent, _number(config, "qk_rope_head_dim"))
        if latent
        else (kv_heads * key, kv_heads * value)
    )
    return _Sizes(
        hidden=hidden,
        heads=heads,
        rows=row,
        key=key,
        value=value,
        inner=max(dense, routed * expert + shared),
        inners=3 if str(activation) in _ONE_STEP else 6,
        experts=experts,
        experts_per_token=routed,
        vocabulary=_number(config, "vocab_size"),
        windows=attends,
        state=recurrent * state,
        scan=scan,
        piece=_CHUNK_TOKENS if "linear_num_value_heads" in config else 1,
        biased=_biased(config),
        item_bytes=_DTYPE_BYTES.get(
            str(config.get("dtype") or config.get("torch_dtype") or "float32"), _FLOAT32
        ),
    )


def with_text_config(config: Config) -> Config:
    """``config`` with the values of its text model, if it has one, replacing its own."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def _kv_heads(config: Config) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return _number(config, "num_key_value_heads", "num_kv_heads")


def _layers(config: Config, layers: int) -> tuple[tuple[int | None, ...], int]:
    """The window of each attention layer, and the number of layers that keep a state instead."""
    window = _number(config, "sliding_window") or None
    if config.get("use_sliding_window") is False:
        window = None
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        kinds = [str(kind) for kind in kinds]
        recurrent = sum(kind in {"linear_attention", "mamba", "conv", "hybrid"} for kind in kinds)
        spans = tuple(
            window if kind == "sliding_attention" else None
            for kind in kinds
            if kind == "hybrid" or ("attention" in kind and kind != "linear_attention")
        )
        return spans, recurrent
    if "state_size" in config:
        return (), layers
    period = _number(config, "sliding_window_pattern", "_sliding_window_pattern")
    spans = tuple(
        None if period and (index + 1) % period == 0 else window for index in range(layers)
    )
    # Configs of hybrids say in many ways which layers do what; assume that all do both.
    return spans, layers if "mamba_d_state" in config else 0


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
    inner = inner or (_number(config, "expand", "mamba_expand") or 2) * hidden
    width = _number(config, "state_size", "mamba_d_state") or 16
    state = inner * (2 * width + kernel) + 2 * _number(config, "n_groups") * width * kernel
    return state, 4 * inner * width


def _biased(config: Config) -> int | None:
    """How many tokens a bias on relative positions is computed for, per token; None: all that it sees."""
    if not _number(config, "relative_attention_num_buckets"):
        return 0
    # Of attention in blocks, each to itself and its neighbours.
    radius = _number(config, "local_radius")
    return 3 * (radius + 1) if radius else None


def _number(config: Config, *names: str) -> int:
    """The first of ``names`` that is a number in ``config``; 0 if none is, or if it is negative."""
    found = (config[name] for name in names if type(config.get(name)) is int)
    return max(0, next(found, 0))
