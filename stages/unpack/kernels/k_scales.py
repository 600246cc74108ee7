"""Scales of a few bits, as GGUF's k-quants pack them."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from layerstream.stages.unpack.kernels.lanes import conversion
from layerstream.stages.unpack.kernels.vectors import BytesType, same, vector_of

__all__ = ["q3_scales", "six_bits"]

_I1, _I32 = ir.IntType(1), ir.IntType(32)


def _shuffled(builder: Any, value: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(value, value, ir.Constant(vector_of(_I32, 16), list(lanes)))


def _q3_scales(builder: Any, value: Any) -> Any:
    lower = _shuffled(builder, value, [*range(2, 10)] * 2)
    lower = builder.lshr(lower, ir.Constant(value.type, [0] * 8 + [4] * 8))
    upper = _shuffled(builder, value, [*range(10, 14)] * 4)
    upper = builder.lshr(upper, ir.Constant(value.type, [lane // 4 * 2 for lane in range(16)]))
    lower = builder.and_(lower, same(value, 15, 8))
    upper = builder.shl(builder.and_(upper, same(value, 3, 8)), same(value, 4, 8))
    return builder.sub(builder.or_(lower, upper), same(value, 32, 8))


q3_scales = conversion(_q3_scales, BytesType)
"""The 16 scales of a block of Q3_K, as signed bytes, from 16 bytes whose third is the first of the scales."""


def _six_bits(builder: Any, value: Any) -> Any:
    # In each half: four numbers in the lower six bits of a byte, then four in a half byte and the two bits left over.
    first = _shuffled(builder, value, [4, 5, 6, 7] * 2 + [8, 9, 10, 11] * 2)
    rest = _shuffled(builder, value, [12, 13, 14, 15] * 4)
    rest = builder.lshr(rest, ir.Constant(value.type, [0] * 8 + [4] * 8))
    upper = builder.shl(builder.lshr(first, same(value, 6, 8)), same(value, 4, 8))
    rest = builder.or_(builder.and_(rest, same(value, 15, 8)), upper)
    is_first = ir.Constant(vector_of(_I1, 16), ([1] * 4 + [0] * 4) * 2)
    return builder.select(is_first, builder.and_(first, same(value, 63, 8)), rest)


six_bits = conversion(_six_bits, BytesType)
"""The eight scales and eight minima of a block of Q4_K or Q5_K, from its first 16 bytes (ggml's ``get_scale_min_k4``)."""
