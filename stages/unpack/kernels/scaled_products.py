"""Products of matrices with scales of their own with the inputs of a few tokens.

Numbers are multiplied as they are, and the sums are kept in registers. A scale that belongs to a multiple of 64 columns is
applied to the sums of these columns; one that belongs to 32, to the numbers.
"""

from typing import Any

import numpy as np

from layerstream.stages.unpack.kernels.factors import factors, has_nan, largest, no_bytes64, unit
from layerstream.stages.unpack.kernels.lanes import float_of
from layerstream.stages.unpack.kernels.scaled_rows import zero_point
from layerstream.stages.unpack.kernels.sums import (
    less_zeros,
    no_sums,
    no_totals,
    plus,
    plus_scaled,
    scaled,
    store_totals,
)
from layerstream.stages.unpack.kernels.vectors import scale_at

__all__ = ["scaled_product"]

_NARROW = 32


def scaled_product(
    begin: int,
    end: int,
    packed: Any,
    scales: Any,
    zeros: Any,
    number_like: Any,
    scale_like: Any,
    geometry: Any,
    first: int,
    rows: int,
    inputs: Any,
    tokens: Any,
    out: Any,
) -> None:
    """Multiply rows with the inputs (tokens, columns).

    The arguments are those of the kernels in ``scaled_rows``, without what products are rounded to; ``rows`` are those of the output
    (tokens, rows), and ``tokens`` is a tuple with one element for each token.
    """
    columns, row_bytes, height, width, bands, groups, zero_bits, matrix_rows = geometry
    # A chunk of 64 columns has one scale, or two.
    apart = 1 if width == _NARROW else 0
    for row in range(first + begin, first + end):
        at = row * row_bytes
        band = row // height % bands * groups
        totals, sums, seen = no_totals(tokens), no_sums(tokens), no_bytes64()
        for group in range(0, groups, 1 + apart):
            index = band + group
            scale = scale_at(scale_like, scales, index)
            zero = float_of(zero_point(zeros, zero_bits, index, row, matrix_rows, group, groups))
            column = group * width
            if apart:
                index += 1
                other = scale_at(scale_like, scales, index)
                last = float_of(
                    zero_point(zeros, zero_bits, index, row, matrix_rows, group + 1, groups)
                )
                values = less_zeros(factors(number_like, packed, at, column), zeros, zero, last)
                sums = plus(sums, scaled(values, scale, other), inputs, columns, column)
                seen = largest(number_like, seen, packed, at + column)
                continue
            for place in range(column, column + width, 64):
                values = less_zeros(factors(number_like, packed, at, place), zeros, zero, zero)
                sums = plus(sums, values, inputs, columns, place)
                seen = largest(number_like, seen, packed, at + place)
            totals = plus_scaled(totals, sums, unit(number_like), scale)
            sums = no_sums(tokens)
        if apart:
            totals = plus_scaled(totals, sums, unit(number_like), np.float32(1))
        store_totals(out, rows, row - first, totals, has_nan(seen))
