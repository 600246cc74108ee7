"""The time that computation takes in one forward pass: seconds per layer, estimated from the config. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.assumptions import Rates
from layerstream.pipeline.planning.model_shape import shape_of, with_text_config
from layerstream.pipeline.planning.planned_layer import PlannedLayer

__all__ = ["ComputeCost", "PassShape"]

_ENCODER = re.compile(r"(^|\.)encoder(\.|$)")
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
    ``1 - (1 - k/E)^tokens`` is read if routing is even. Packed weights are unpacked in every pass, at a rate of their encoding,
    and each takes Python a constant time. Attention of ``q`` new tokens over a context of ``c`` takes
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
        self._seconds: dict[
            tuple[str, PassShape, bool, bool], float
        ] = {}  # by the arguments of ``seconds``
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

    def seconds(
        self,
        layer: PlannedLayer,
        shape: PassShape,
        *,
        mapped: bool = False,
        unpacked: bool = False,
    ) -> float:
        """Seconds to compute ``layer``.

        Args:
            layer: What to compute with.
            shape: Of the pass.
            mapped: Its weights are used in a mapping of the files.
            unpacked: Those that are packed are kept unpacked in memory.
        """
        known = layer.name, shape, mapped, unpacked
        if known not in self._seconds:
            self._seconds[known] = self._computed(layer, shape, mapped=mapped, unpacked=unpacked)
        return self._seconds[known]

    def _computed(
        self, layer: PlannedLayer, shape: PassShape, *, mapped: bool, unpacked: bool
    ) -> float:
        if layer.kind is LayerKind.EMBEDDING:
            return 0.0  # only rows are looked up
        tokens = shape.sequences * (1 if layer.kind is LayerKind.HEAD else shape.tokens)
        weights = layer.weights
        dense = weights.dense_bytes
        total = self._matrices_seconds(
            dense,
            {} if unpacked else weights.packed,
            weights.unpacked,
            tokens=tokens,
            fused=tokens <= self._fused_tokens,
        )
        calls: float = 0 if unpacked else weights.packed_matrices
        if weights.expert_bytes:
            read_share = 1 - (1 - self._expert_share) ** tokens
            tokens_per_expert = tokens * self._expert_share / read_share
            total += read_share * self._matrices_seconds(
                weights.expert_bytes,
                weights.packed_experts,
                weights.unpacked_experts,
                tokens=tokens_per_expert,
                fused=tokens <= self._fused_tokens,
            )
            calls += read_share * weights.packed_expert_matrices
        total += calls * self._rates.packed_matrix_seconds
        if mapped and not unpacked:
            total += dense * self._rates.mapped_seconds_per_byte
        if layer.kind is LayerKind.BLOCK:
            total += self._elementwise(dense, tokens) + self._attention(shape)
            launches = self._rates.block_seconds
            total = max(total, launches) if self._rates.launches_ahead else total + launches
        return total

    def _matrices_seconds(
        self,
        plain: int,
        packed: Mapping[str, int],
        unpacked: Mapping[str, int],
        *,
        tokens: float,
        fused: bool,
    ) -> float:
        """Of matrices that ``tokens`` tokens each are multiplied with.

        Args:
            plain: Their bytes, unpacked.
            packed: Their packed bytes, by encoding.
            unpacked: Unpacked bytes of those that fused kernels can multiply with.
            tokens: For the rates.
            fused: Whether fused kernels multiply, if there are any.
        """
        seconds = 0.0
        for encoding, packed_bytes in packed.items():
            multiplied = self._rates.multiplied_per_second(encoding, tokens)
            if fused and encoding in unpacked and multiplied is not None:
                plain -= unpacked[encoding]
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
