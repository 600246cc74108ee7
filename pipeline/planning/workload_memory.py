"""The memory of a workload besides the weights, estimated from a model's shape. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerstream.pipeline.planning.model_shape import Config, ModelShape, shape_of
from layerstream.pipeline.planning.plan import Workload
from layerstream.stages.memory import round_up

__all__ = ["WASTE", "WorkloadMemory", "estimate_memory", "has_sinks"]

_FLOAT32_BYTES = 4

# Choosing a token by top-p: logits, sorted ones, softmax and its running sum in float32, and the order in int64.
_SAMPLING_BYTES = 24

# A score, its sum with a mask or a bias, and its softmax, in float32.
_EAGER_SCORE_BYTES = 3 * _FLOAT32_BYTES

# Memory of a process for activations, divided by the bytes alive: glibc keeps freed blocks in the thread's heap. 1.1 to
# 1.9 times was measured for dense models, with sequences of 128 to 2048 tokens; caching allocators of GPUs round up.
# Large blocks are not kept where the C library maps them one by one.
WASTE = 2

# Finding the bucket of a pair of positions by their distance: six tensors of int64, and comparisons of them.
_BUCKET_BYTES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadMemory:
    """The memory of a workload besides the weights, in bytes."""

    kv_bytes: int
    """KV cache (or a recurrent model's state) of all sequences, after the last token."""
    prefill_bytes: int
    """The most besides the cache while the prompt is processed, including logits."""
    decode_bytes: int
    """The same while each sequence gets one more token, including the growth of the cache."""
    measured: bool
    """In a pass on the meta device; otherwise estimated from the config."""
    own_buffer_bytes: int = 0
    """Buffers of the model that each request has of its own."""
    prefill_taken_bytes: int | None = None
    """What a process takes for the bytes of the prompt; None if that is only known to be ``WASTE`` times these at most."""
    decode_taken_bytes: int | None = None
    """The same for a token more."""
    prompt_tokens: int | None = None
    """Tokens of the longest prompt that the model has positions for, if the workload has more."""

    sizes_are_computed: bool = False
    """Sizes in a pass, such as the length of the sound that it makes, depend on what it computes: the rest is too low."""

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at any time."""
        return self.kv_bytes + max(self.prefill_bytes, self.decode_bytes) + self.own_buffer_bytes

    @property
    def reserved_bytes(self) -> int:
        """The most that a process allocates, including the overhead of allocators."""
        return self.kv_bytes + max(self.taken_bytes) + self.own_buffer_bytes

    @property
    def spare_bytes(self) -> int:
        """The part of the reserved memory that is free while no prompt is processed."""
        prefill, decode = self.taken_bytes
        return max(0, prefill - decode)

    @property
    def taken_bytes(self) -> tuple[int, int]:
        """What a process takes besides the cache for the prompt, and for a token more."""
        prefill, decode = self.prefill_taken_bytes, self.decode_taken_bytes
        return (
            WASTE * self.prefill_bytes if prefill is None else prefill,
            WASTE * self.decode_bytes if decode is None else decode,
        )

    @classmethod
    def largest(cls, memories: Sequence["WorkloadMemory"]) -> "WorkloadMemory | None":
        """What is enough for each of ``memories``, different ways to compute the same; None without any."""
        if not memories:
            return None
        taken = [each.taken_bytes for each in memories]
        return cls(
            kv_bytes=max(each.kv_bytes for each in memories),
            prefill_bytes=max(each.prefill_bytes for each in memories),
            decode_bytes=max(each.decode_bytes for each in memories),
            measured=all(each.measured for each in memories),
            own_buffer_bytes=max(each.own_buffer_bytes for each in memories),
            prompt_tokens=memories[0].prompt_tokens,
            sizes_are_computed=any(each.sizes_are_computed for each in memories),
            prefill_taken_bytes=max(prefill for prefill, _ in taken),
            decode_taken_bytes=max(decode for _, decode in taken),
        )

    def scaled(self, times: int) -> "WorkloadMemory":
        """The memory of ``times`` as many sequences."""
        prefill, decode = self.taken_bytes
        return WorkloadMemory(
            kv_bytes=times * self.kv_bytes,
            prefill_bytes=times * self.prefill_bytes,
            decode_bytes=times * self.decode_bytes,
            measured=self.measured,
            own_buffer_bytes=times * self.own_buffer_bytes,
            prefill_taken_bytes=times * prefill,
            decode_taken_bytes=times * decode,
            prompt_tokens=self.prompt_tokens,
            sizes_are_computed=self.sizes_are_computed,
        )


def has_sinks(names: Iterable[str]) -> bool:
    """Whether attention has sinks, by the names of a model's weights: no config says it."""
    return any(name.rpartition(".")[2] == "sinks" for name in names)


def estimate_memory(
    config: Config | None, workload: Workload, *, sinks: bool = False, eager: bool = False
) -> WorkloadMemory | None:
    """Estimate the memory of ``workload`` in the model that ``config`` (a config.json) describes.

    The cache is exact for attention that transformers caches by heads: grouped, sliding, latent. Activations are an
    estimate: those of the largest step of a block, with attention scores only if no fused kernel supports the heads.

    Args:
        config: The model's.
        workload: What it is asked for.
        sinks: Whether its attention has sinks, for which transformers computes all scores.
        eager: Whether no kernel is known to compute its attention: then all scores of all heads are added.

    Returns:
        None if ``config`` lacks shape.
    """
    shape = shape_of(config)
    if shape is None:
        return None
    batch, prompt = workload.batch_size, workload.prompt_tokens
    tokens = prompt + workload.new_tokens
    cached = _cached_bytes(shape, batch, tokens)
    # While a layer's keys grow by concatenation, they exist twice.
    growth = batch * tokens * max(shape.cached) * shape.item_bytes if shape.windows else 0
    logits = batch * shape.vocabulary * (shape.item_bytes + _SAMPLING_BYTES)
    prefill = max(_activation_bytes(shape, batch, prompt, prompt, sinks=sinks), logits)
    # A sliding window keeps all of the prompt until the next token.
    prefill += max(0, _cached_bytes(shape, batch, prompt, slides=False) - cached)
    # Of a token's heads; a model without them has no scores.
    eager_scores = batch * shape.heads * tokens * _EAGER_SCORE_BYTES
    if not eager or shape.heads == 1 or not shape.windows:
        eager_scores = 0
    decode = growth + max(_activation_bytes(shape, batch, 1, tokens, sinks=sinks), logits)
    return WorkloadMemory(
        kv_bytes=cached,
        prefill_bytes=prefill + prompt * eager_scores,
        decode_bytes=decode + eager_scores,
        measured=False,
    )


def _cached_bytes(shape: ModelShape, batch: int, tokens: int, *, slides: bool = True) -> int:
    kept_tokens = sum(
        min(tokens, window) if window is not None and slides else tokens for window in shape.windows
    )
    return batch * (kept_tokens * sum(shape.cached) + shape.recurrent_state) * shape.item_bytes


def _activation_bytes(
    shape: ModelShape, batch: int, tokens: int, context: int, *, sinks: bool
) -> int:
    """The most that is alive while a block computes ``tokens`` new ones of ``context`` tokens per sequence."""
    padded = round_up(tokens, shape.chunk_tokens) if tokens > 1 else tokens
    attention = max(
        batch * _score_bytes(shape, tokens, context, sinks=sinks),
        batch * _mask_bytes(shape, batch, tokens, context),
        _bias_bytes(shape, batch, tokens, context),
    )
    return batch * padded * _token_bytes(shape) + attention


def _token_bytes(shape: ModelShape) -> int:
    """The most per token, in any step of a block."""
    item, hidden, heads = shape.item_bytes, shape.hidden, shape.heads
    norm = hidden * (2 * item + 3 * _FLOAT32_BYTES)
    # Input, residual; queries and keys before and after rotation, and intermediate tensors of it.
    queries, cached = heads * shape.key, sum(shape.cached)
    attention = (2 * hidden + 4 * queries + 3 * cached + heads * shape.value) * item
    # Gate, up and their product; a mixture of experts repeats its input for each expert of a token.
    mlp = (3 * hidden + shape.intermediates * shape.intermediate) * item
    if shape.experts_per_token:  # their product exists besides both of them
        mlp += (3 * shape.experts_per_token * hidden + shape.intermediate) * item
        mlp += 4 * shape.experts * _FLOAT32_BYTES
    scan = 2 * hidden * item + shape.recurrent_scan * _FLOAT32_BYTES
    return max(norm, attention, mlp, scan)


def _score_bytes(shape: ModelShape, tokens: int, context: int, *, sinks: bool) -> int:
    """Of a sequence's attention scores, where they are computed without a fused kernel."""
    if sinks:
        # Scores, those with the sinks beside them, and their softmax; and the keys and values for all heads.
        pairs = 3 * shape.heads * tokens * context
        return (pairs + shape.heads * context * (shape.key + shape.value)) * shape.item_bytes
    if shape.key == shape.value:
        return 0
    # No fused CPU kernel supports these: scores and weights in float32, keys and values for all heads.
    item, heads = shape.item_bytes, shape.heads
    scores = heads * tokens * context * (2 * _FLOAT32_BYTES + item)
    return scores + 2 * heads * context * (shape.key + shape.value) * (item + _FLOAT32_BYTES)


def _mask_bytes(shape: ModelShape, batch: int, tokens: int, context: int) -> int:
    """Of a sequence, if those of a batch differ in length, or not all tokens are attended to."""
    if batch == 1 and all(window is None or tokens <= window for window in shape.windows):
        return 0
    # Masks, one of them as numbers, and keys and values for all heads.
    item = shape.item_bytes
    masks = tokens * context * (2 + item)
    return masks + context * shape.heads * (shape.key + shape.value) * item


def _bias_bytes(shape: ModelShape, batch: int, tokens: int, context: int) -> int:
    """Of a bias on relative positions, for all sequences."""
    if shape.bias_span == 0:
        return 0
    # The mask is added to it for each sequence; if some are shorter, there is the mask as numbers, too.
    pairs = tokens * min(context, shape.bias_span or context)
    heads_bytes = shape.heads * shape.item_bytes
    added = (2 * batch if batch > 1 else 1) * heads_bytes
    return pairs * max(_BUCKET_BYTES, heads_bytes + added)
