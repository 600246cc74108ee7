"""Matrices whose scales are tensors of their own: one for a block of rows and columns. Numbers of 8 bits, or of 4.

Both kernels take the bytes of the weights, of the scales and of the zero points, three arrays whose types tell how to read
numbers and scales and what to round products to, the geometry (``scaled_rows.Geometry``), which row is the output's first, and the
output, of which they write rows ``begin`` to ``end``.
"""

from typing import Any

import numpy as np
from numba.extending import register_jitable

from layerstream.stages.unpack.kernels.lanes import (
    bare_numbers,
    float_of,
    interleaved_high,
    interleaved_low,
    less,
    numbers,
    unit_of,
)
from layerstream.stages.unpack.kernels.outputs import put, put_both, put_normal, rounded
from layerstream.stages.unpack.kernels.vectors import byte_at, bytes1_at, bytes16_at, scale_at

__all__ = ["scaled_bytes", "scaled_nibbles", "zero_point"]

# No unit is larger than 2^8, and no number but zero smaller than 2^-17 times its unit: from here to there, products are normal.
_SMALL_SCALE, _LARGE_SCALE = np.float32(2.0**-109), np.float32(2.0**119)


@register_jitable
def _is_usual(scale: Any) -> Any:
    """Whether products are neither subnormal nor infinite."""
    return scale == 0 or _SMALL_SCALE <= abs(scale) < _LARGE_SCALE


@register_jitable
def zero_point(
    zeros: Any, bits: int, index: int, row: int, rows: int, group: int, groups: int
) -> Any:
    """Return the zero point of a block: none, a signed byte beside each scale, or packed along the rows of each matrix."""
    if bits == 0:
        return 0
    if bits < 0:
        return (byte_at(zeros, index) ^ 128) - 128
    words = (rows * bits + 31) // 32
    bit = row % rows * bits
    at = ((row // rows * words + bit // 32) * groups + group) * 4 + bit % 32 // 8
    return ((byte_at(zeros, at) >> (bit % 8)) & ((1 << bits) - 1)) - (1 << (bits - 1))


def scaled_bytes(
    begin: int,
    end: int,
    packed: Any,
    scales: Any,
    zeros: Any,
    number_like: Any,
    scale_like: Any,
    like: Any,
    geometry: Any,
    first: int,
    out: Any,
) -> None:
    """Unpack rows of one byte for each number."""
    columns, row_bytes, height, width, bands, groups, zero_bits, matrix_rows = geometry
    for row in range(first + begin, first + end):
        at, start = row * row_bytes, (row - first) * columns
        band = row // height % bands * groups
        for group in range(groups):
            index = band + group
            scale = scale_at(scale_like, scales, index)
            zero = float_of(zero_point(zeros, zero_bits, index, row, matrix_rows, group, groups))
            column, last = group * width, min(columns, (group + 1) * width)
            # The unit is multiplied with the scale, once, unless that might not be finite.
            whole = scale * unit_of(number_like)
            most = last if _is_usual(scale) else column
            while column + 64 <= most:
                for chain in range(0, 4, 2):
                    place = column + 16 * chain
                    one = less(
                        bare_numbers(number_like, bytes16_at(packed, at + place)), zeros, zero
                    )
                    place += 16
                    two = less(
                        bare_numbers(number_like, bytes16_at(packed, at + place)), zeros, zero
                    )
                    one, two = rounded(like, one * whole), rounded(like, two * whole)
                    put_normal(out, start + place - 16, one, two, chain)
                column += 64
            while column + 16 <= most:
                number = less(
                    bare_numbers(number_like, bytes16_at(packed, at + column)), zeros, zero
                )
                put(out, start + column, rounded(like, number * whole), column >> 4 & 3)
                column += 16
            while column < last:
                number = less(numbers(number_like, bytes1_at(packed, at + column)), zeros, zero)
                put(out, start + column, rounded(like, number * scale), 1)
                column += 1


def scaled_nibbles(
    begin: int,
    end: int,
    packed: Any,
    scales: Any,
    zeros: Any,
    number_like: Any,
    scale_like: Any,
    like: Any,
    geometry: Any,
    first: int,
    out: Any,
) -> None:
    """Unpack rows of two numbers for each byte, the first in the lower four bits."""
    columns, row_bytes, height, width, bands, groups, zero_bits, matrix_rows = geometry
    for row in range(first + begin, first + end):
        at, start = row * row_bytes, (row - first) * columns
        band = row // height % bands * groups
        for group in range(groups):
            index = band + group
            scale = scale_at(scale_like, scales, index)
            zero = float_of(zero_point(zeros, zero_bits, index, row, matrix_rows, group, groups))
            column, last = group * width, min(columns, (group + 1) * width)
            most = last if _is_usual(scale) else column
            while column & 1 == 0 and column + 64 <= most:
                for half in range(2):
                    place = column + 32 * half
                    both = bytes16_at(packed, at + (place >> 1))
                    low, high = both & 15, both >> 4
                    first16, second16 = interleaved_low(low, high), interleaved_high(low, high)
                    one = less(numbers(number_like, first16), zeros, zero)
                    two = less(numbers(number_like, second16), zeros, zero)
                    one, two = rounded(like, one * scale), rounded(like, two * scale)
                    put_normal(out, start + place, one, two, 2 * half)
                column += 64
            while column < last:
                if column & 1 == 0 and column + 32 <= last:
                    chain = column >> 4 & 2
                    both = bytes16_at(packed, at + (column >> 1))
                    low, high = both & 15, both >> 4
                    first16, second16 = interleaved_low(low, high), interleaved_high(low, high)
                    one = less(numbers(number_like, first16), zeros, zero)
                    two = less(numbers(number_like, second16), zeros, zero)
                    one, two = rounded(like, one * scale), rounded(like, two * scale)
                    put_both(out, start + column, one, two, chain)
                    column += 32
                else:
                    one = (bytes1_at(packed, at + (column >> 1)) >> ((column & 1) << 2)) & 15
                    number = less(numbers(number_like, one), zeros, zero)
                    put(out, start + column, rounded(like, number * scale), 2)
                    column += 1
