"""The time that computation takes in one forward pass: seconds per layer, estimated from the config. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.assumptions import Rates
from layerstream.pipeline.planning.layout import PlannedLayer
from layerstream.pipeline.planning.model_shape import shape_of, with_text_config

__all__ = ["ComputeCost", "PassShape", "packed_bytes"]

_EXPERT = re.compile(r"(^|\.)experts?(\.|$)")
_ENCODER = re.compile(r"(^|\.)encoder(\.|$)")
_MATRIX_DIMENSIONS = 2
_KV_ITEM_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """The shape of one forward pass."""

    sequences: int
    tokens: int
    """New ones of each sequence."""
    context: int
    """Tokens of each sequence after the pass, including the new ones."""
    prompt: bool
    """Whether it is a request's first pass."""


class ComputeCost:
    """The time of computing with the model that ``config`` (a config.json) describes, at ``rates``.

    The time of a linear layer is its bytes divided by the rate measured for the pass's number of tokens. A mixture of
    experts computes with those that tokens are routed to: of E experts, k for each token, a share of
    ``1 - (1 - k/E)^tokens`` is read if routing is even. Packed weights are unpacked in every pass, at a rate of their encoding. Attention of ``q`` new tokens over a context of ``c`` takes
    ``4 q c`` times the width of the heads in operations, at one rate for prompts and another for a single token. A step
    copies the KV cache to append to it. Operations per element take a share of the time of multiplications. Running a
    block's Python and launching its kernels takes a constant time, during which a GPU computes. The head computes the
    last token of each sequence, as in generation.
    """

    def __init__(
        self, config: Mapping[str, Any] | None, rates: Rates, *, fused_tokens: int = 0
    ) -> None:
        shape = shape_of(config)
        self._rates = rates
        self._fused_tokens = fused_tokens
        self._weights: dict[str, _Weights] = {}  # by layer name
        self._encodes_once = bool(with_text_config(config or {}).get("is_encoder_decoder"))
        self._expert_share = 1.0
        self._attention_width = self._kv_width = 0
        if shape is not None:
            if shape.experts and shape.experts_per_token:
                self._expert_share = min(1.0, shape.experts_per_token / shape.experts)
            # Keys are multiplied with queries, and values with what comes of that.
            self._attention_width = shape.heads * (shape.key + shape.value) // 2
            self._kv_width = sum(shape.cached)

    def visits(self, layer: PlannedLayer, shape: PassShape) -> bool:
        """Whether the pass needs ``layer``: an encoder runs for the prompt only."""
        return shape.prompt or not (self._encodes_once and _ENCODER.search(layer.name))

    def seconds(self, layer: PlannedLayer, shape: PassShape, *, mapped: bool = False) -> float:
        """Seconds to compute ``layer``; ``mapped``: its weights are used in a mapping of the files."""
        if layer.kind is LayerKind.EMBEDDING:
            return 0.0  # only rows are looked up
        tokens = shape.sequences * (1 if layer.kind is LayerKind.HEAD else shape.tokens)
        if layer.name not in self._weights:
            self._weights[layer.name] = _weights_of(layer, self._rates)
        weights = self._weights[layer.name]
        dense = weights.dense_bytes
        total = self._dense_seconds(weights, tokens)
        if weights.expert_bytes:
            read_share = 1 - (1 - self._expert_share) ** tokens
            tokens_per_expert = tokens * self._expert_share / read_share
            total += read_share * (
                weights.expert_bytes / self._rates.weights_per_second(tokens_per_expert)
                + weights.expert_unpacking_seconds
            )
        if mapped:
            total += dense * self._rates.mapped_seconds_per_byte
        if layer.kind is LayerKind.BLOCK:
            total += self._elementwise(dense, tokens) + self._attention(shape)
            launches = self._rates.block_seconds
            total = max(total, launches) if self._rates.launches_ahead else total + launches
        return total

    def _dense_seconds(self, weights: "_Weights", tokens: int) -> float:
        """Of the matrices that every token is multiplied with."""
        plain = weights.dense_bytes
        seconds = 0.0
        for encoding, (packed_bytes, plain_bytes) in weights.packed.items():
            multiplied = self._rates.multiplied_per_second(encoding, tokens)
            if tokens <= self._fused_tokens and multiplied is not None:
                plain -= plain_bytes
                seconds += packed_bytes / multiplied
            else:
                seconds += packed_bytes / self._rates.unpacked_per_second(encoding)
        return seconds + plain / self._rates.weights_per_second(tokens)

    def _elementwise(self, nbytes: int, tokens: int) -> float:
        last = self._rates.compute[-1]
        multiplication = nbytes * tokens / (last.bytes_per_second * last.tokens)
        return self._rates.elementwise * multiplication

    def _attention(self, shape: PassShape) -> float:
        pairs = shape.sequences * shape.tokens * shape.context
        rates = self._rates
        one = shape.tokens == 1
        rate = rates.step_attention_flops_per_second if one else rates.attention_flops_per_second
        seconds = 4 * pairs * self._attention_width / rate
        if shape.prompt:
            return seconds
        cached_bytes = _KV_ITEM_BYTES * shape.sequences * shape.context * self._kv_width
        return seconds + cached_bytes / rates.kv_growth_bytes_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """What a layer computes with."""

    dense_bytes: int
    """Of matrices that every token is multiplied with, unpacked."""
    expert_bytes: int
    """Of all experts, unpacked."""
    packed: Mapping[str, tuple[int, int]]
    """Of what is not an expert: packed and plain bytes, by encoding."""
    expert_unpacking_seconds: float
    """Of all experts."""


def _weights_of(layer: PlannedLayer, rates: Rates) -> _Weights:
    dense = experts = 0
    seconds = 0.0
    for tensor in layer.tensors:
        is_matrix = len(tensor.shape) >= _MATRIX_DIMENSIONS
        nbytes = tensor.packed.plain_bytes if tensor.packed else tensor.nbytes * is_matrix
        if not _EXPERT.search(tensor.name):
            dense += nbytes
            continue
        experts += nbytes
        if tensor.packed is not None:
            seconds += tensor.nbytes / rates.unpacked_per_second(tensor.packed.encoding)
    for source in layer.experts:
        for part in source.tensors:
            if part.packed is None:
                experts += source.experts * part.nbytes
                continue
            experts += source.experts * part.packed.plain_bytes
            rate = rates.unpacked_per_second(part.packed.encoding)
            seconds += source.experts * part.nbytes / rate
    return _Weights(
        dense_bytes=dense,
        expert_bytes=experts,
        packed=packed_bytes([layer]),
        expert_unpacking_seconds=seconds,
    )


def packed_bytes(layers: Iterable[PlannedLayer]) -> dict[str, tuple[int, int]]:
    """Packed and plain bytes of the packed weights that every token is multiplied with, by encoding."""
    found: dict[str, tuple[int, int]] = {}
    for layer in layers:
        for tensor in layer.tensors:
            if tensor.packed is not None and not _EXPERT.search(tensor.name):
                before = found.get(tensor.packed.encoding, (0, 0))
                found[tensor.packed.encoding] = (
                    before[0] + tensor.nbytes,
                    before[1] + tensor.packed.plain_bytes,
                )
    return found
