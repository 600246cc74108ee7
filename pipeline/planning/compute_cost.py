"""The time that computation takes in one forward pass: seconds per layer, estimated from the config. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.assumptions import Rates
from layerstream.pipeline.planning.layout import PlannedLayer
from layerstream.pipeline.planning.model_shape import with_text_config

__all__ = ["ComputeCost", "PassShape"]

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

    def __init__(self, config: Mapping[str, Any] | None, rates: Rates) -> None:
        text = with_text_config(config or {})
        self._rates = rates
        self._weights: dict[str, _Weights] = {}  # by layer name
        self._encodes_once = bool(text.get("is_encoder_decoder"))
        experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts")
        per_token = _first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
        self._expert_share = min(1.0, per_token / experts) if experts and per_token else 1.0
        heads = _first(text, "num_attention_heads", "n_head", "num_heads") or 0
        hidden = _first(text, "hidden_size", "n_embd", "d_model") or 0
        head = _first(text, "head_dim", "d_kv") or (hidden // heads if heads else 0)
        self._attention_width = heads * head
        self._kv_width = 2 * (_first(text, "num_key_value_heads") or heads) * head

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
        total = dense / self._rates.weights_per_second(tokens) + weights.unpacking_seconds
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
    unpacking_seconds: float
    """Of what is not an expert."""
    expert_unpacking_seconds: float
    """Of all experts."""


def _weights_of(layer: PlannedLayer, rates: Rates) -> _Weights:
    nbytes = [0, 0]  # dense, experts
    seconds = [0.0, 0.0]
    for tensor in layer.tensors:
        is_expert = bool(_EXPERT.search(tensor.name))
        if tensor.packed is not None:
            nbytes[is_expert] += tensor.packed.plain_bytes
            seconds[is_expert] += tensor.nbytes / rates.unpacked_per_second(tensor.packed.encoding)
        elif len(tensor.shape) >= _MATRIX_DIMENSIONS:
            nbytes[is_expert] += tensor.nbytes
    for source in layer.experts:
        for part in source.tensors:
            if part.packed is None:
                nbytes[1] += source.experts * part.nbytes
                continue
            nbytes[1] += source.experts * part.packed.plain_bytes
            rate = rates.unpacked_per_second(part.packed.encoding)
            seconds[1] += source.experts * part.nbytes / rate
    return _Weights(
        dense_bytes=nbytes[0],
        expert_bytes=nbytes[1],
        unpacking_seconds=seconds[0],
        expert_unpacking_seconds=seconds[1],
    )


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of ``names`` that is a positive number in ``config``."""
    return next((config[n] for n in names if type(config.get(n)) is int and config[n] > 0), None)
