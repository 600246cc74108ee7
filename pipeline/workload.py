"""The memory that a workload takes beside the weights, estimated from a model's config. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerstream.pipeline.plan import Workload

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

# Activation functions that torch computes in one step; others leave tensors of their own on the way.
_ONE_STEP = {"silu", "swish", "relu", "gelu", "gelu_pytorch_tanh"}

# What a process takes for activations beyond what is alive: glibc keeps freed blocks in the thread's heap. 1.1 to 1.9
# times was measured for dense models, with sequences of 128 to 2048 tokens; caching allocators of GPUs round and split.
_WASTE = 2

# Linear attention goes through its prompt in pieces of this many tokens.
_CHUNK_TOKENS = 64

# A config.json that says more of them says nothing.
_MOST_LAYERS = 100_000

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadMemory:
    """What a workload takes beside the weights, in bytes."""

    kv_bytes: int  # KV cache (or a recurrent model's state) of all sequences, when the last token is there
    # On top of the cache while the prompt is processed, at most; logits included.
    prefill_bytes: int
    # The same while every sequence gets one more token; with what the cache takes to grow.
    decode_bytes: int
    measured: bool  # in a pass on the meta device; else estimated from the config

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at a time."""
        return self.kv_bytes + max(self.prefill_bytes, self.decode_bytes)

    @property
    def reserved_bytes(self) -> int:
        """The most that it takes of a process, with what allocators waste."""
        return self.kv_bytes + _WASTE * max(self.prefill_bytes, self.decode_bytes)

    @property
    def spare_bytes(self) -> int:
        """What of that is free while no prompt is processed."""
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
    """What ``workload`` takes in the model that ``config`` (a config.json) describes.

    The cache is exact for the attention that transformers caches by heads: grouped, sliding, latent. Activations are
    those of the largest of a block's steps, as if attention made no scores unless no fused kernel takes its
    heads; an estimate.

    Returns:
        None if ``config`` does not tell the sizes.
    """
    sizes = _sizes(config)
    if sizes is None:
        return None
    batch, prompt = workload.batch_size, workload.prompt_tokens
    tokens = prompt + workload.new_tokens
    cached = _cached_bytes(sizes, batch, tokens)
    # While a layer's keys grow by concatenation, they are there twice.
    growing = batch * tokens * max(sizes.rows) * sizes.item_bytes if sizes.windows else 0
    logits = batch * sizes.vocabulary * (sizes.item_bytes + _SAMPLING_BYTES)
    prefill = max(_activation_bytes(sizes, batch, prompt, prompt), logits)
    # A sliding window holds all of the prompt until the next token comes.
    prefill += max(0, _cached_bytes(sizes, batch, prompt, slides=False) - cached)
    return WorkloadMemory(
        kv_bytes=cached,
        prefill_bytes=prefill,
        decode_bytes=growing + max(_activation_bytes(sizes, batch, 1, tokens), logits),
        measured=False,
    )


def kv_bytes(config: Config, *, batch_size: int, tokens: int) -> int:
    """Bytes of the KV cache, or of a recurrent model's state, for ``batch_size`` sequences of ``tokens``.

    0 if ``config`` does not tell the sizes.
    """
    sizes = _sizes(config)
    return 0 if sizes is None else _cached_bytes(sizes, batch_size, tokens)


def workload_bytes(config: Config | None, workload: Workload | None) -> tuple[int, tuple[str, ...]]:
    """What ``estimate_memory`` says is to be reserved, and notes on what was assumed."""
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
    """How wide a decoder's matrices are, in elements of ``item_bytes``."""

    widest: int  # of all in its blocks
    vocabulary: int
    item_bytes: int


def widths_of(config: Config | None) -> Widths | None:
    """The widths in the model that ``config`` (a config.json) describes; None if it does not tell its sizes."""
    sizes = _sizes(config)
    if sizes is None:
        return None
    widest = max(sizes.hidden, sizes.heads * sizes.key, sum(sizes.rows), sizes.inner)
    return Widths(widest=widest, vocabulary=sizes.vocabulary, item_bytes=sizes.item_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The sizes of a decoder, in elements where nothing else is said."""

    hidden: int
    heads: int
    # What a layer caches of a token: keys and values, or what they are expanded from.
    rows: tuple[int, int]
    key: int  # per head
    value: int
    inner: int  # of all experts that compute for a token
    inners: int  # how many tensors of that width are alive at a time
    experts: int
    experts_per_token: int
    vocabulary: int
    windows: tuple[int | None, ...]  # per attention layer: how many tokens it looks back; None: all
    state: int  # of all recurrent layers, per sequence
    scan: int  # of a recurrent layer, in float32 per token of the prompt
    piece: int  # tokens that it computes at a time: a prompt is filled up to a multiple
    item_bytes: int


def _cached_bytes(sizes: _Sizes, batch: int, tokens: int, *, slides: bool = True) -> int:
    spans = sum(
        min(tokens, window) if window is not None and slides else tokens for window in sizes.windows
    )
    return batch * (spans * sum(sizes.rows) + sizes.state) * sizes.item_bytes


def _activation_bytes(sizes: _Sizes, batch: int, tokens: int, seen: int) -> int:
    """What is alive at most while ``tokens`` of ``seen`` per sequence go through a block."""
    item, hidden, heads = sizes.item_bytes, sizes.hidden, sizes.heads
    queries, kept = heads * sizes.key, sum(sizes.rows)
    norm = hidden * (2 * item + 3 * _FLOAT32)
    # Input, residual; queries and keys as they are, rotated, and what rotating takes.
    attention = (2 * hidden + 4 * queries + 3 * kept + heads * sizes.value) * item
    # Gate, up and their product; a mixture of experts repeats its input for each that computes for a token.
    routed = sizes.experts_per_token
    inner = (3 * hidden + sizes.inners * sizes.inner) * item
    if routed:  # what it makes of gate and up lies beside both of them
        inner += (3 * routed * hidden + sizes.inner) * item + 4 * sizes.experts * _FLOAT32
    scan = 2 * hidden * item + sizes.scan * _FLOAT32
    per_token = max(norm, attention, inner, scan)
    scores = 0
    if sizes.key != sizes.value:
        # No fused kernel of the CPU takes these: scores and weights in float32, keys and values for all heads.
        scores = heads * tokens * seen * (2 * _FLOAT32 + item)
        scores += 2 * heads * seen * (sizes.key + sizes.value) * (item + _FLOAT32)
    # Where sequences of a batch differ in length, or not all tokens are seen: masks, and one as numbers, and
    # keys and values for all heads.
    masks = 0
    if batch > 1 or any(window is not None and tokens > window for window in sizes.windows):
        masks = tokens * seen * (2 + item) + seen * heads * (sizes.key + sizes.value) * item
    if tokens > 1:
        tokens = -(-tokens // sizes.piece) * sizes.piece
    return batch * (tokens * per_token + max(scores, masks))


def _sizes(config: Config | None) -> _Sizes | None:
    """What ``config`` says of the decoder; None if it tells no hidden size or no number of layers."""
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
        item_bytes=_DTYPE_BYTES.get(
            str(config.get("dtype") or config.get("torch_dtype") or "float32"), _FLOAT32
        ),
    )


def with_text_config(config: Config) -> Config:
    """``config`` with what it says of its text model, if it has one, in place of its own."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def _kv_heads(config: Config) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return _number(config, "num_key_value_heads", "num_kv_heads")


def _layers(config: Config, layers: int) -> tuple[tuple[int | None, ...], int]:
    """How far each attention layer looks back, and how many layers keep a state instead."""
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
    # Which layers of a hybrid do what is told in many ways: as if all did both.
    return spans, layers if "mamba_d_state" in config else 0


def _recurrence(config: Config, hidden: int) -> tuple[int, int]:
    """Of a recurrent layer: elements that it keeps of a sequence, and in float32 per token of a prompt."""
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


def _number(config: Config, *names: str) -> int:
    """The first of ``names`` that ``config`` gives a number; else 0, as for one below."""
    found = (config[name] for name in names if type(config.get(name)) is int)
    return max(0, next(found, 0))
