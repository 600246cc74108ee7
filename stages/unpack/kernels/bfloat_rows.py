"""Products of matrices of bfloat16 with single rows, summed in the order in which oneDNN sums on processors with AVX-512 BF16.

Their instruction adds the products of two neighbouring numbers to a sum, the second one first. A sum runs over so many columns from
zero; those of several are added one after the other. Each of 16 lanes has the sum of a row of its own: for that, 16 pieces
of rows are transposed in registers.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from layerstream.stages.unpack.kernels.outputs import put
from layerstream.stages.unpack.kernels.vectors import (
    FloatsType,
    address,
    fetch_ahead,
    generated,
    repeated,
    vector_of,
)

__all__ = ["bfloat_rows"]

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOAT = ir.FloatType()
_LANES = 16
# Columns that are loaded of a row at once.
_STEP = 32


def bfloat_rows(
    begin: int,
    end: int,
    matrices: Any,
    stride: int,
    start: int,
    places: Any,
    summed: Any,
    rows: int,
    columns: int,
    inputs: Any,
    out: Any,
) -> None:
    """Multiply row n of ``inputs`` with matrix ``places[n]``.

    Args:
        begin: The first of the blocks of 16 outputs that are computed; they are counted over all rows of ``out``.
        end: Behind the last one.
        matrices: Memory, bfloat16.
        stride: Numbers from one matrix to the next.
        start: Where the first one is.
        places: The number of the matrix for each input.
        summed: For each input, how many columns make a sum, a multiple of 32.
        rows: Of a matrix, a multiple of 16.
        columns: Of a matrix, a multiple of 32.
        inputs: Rows of ``columns`` numbers, two in one int32.
        out: Rows of ``rows`` numbers.
    """
    blocks = rows // _LANES
    for block in range(begin, end):
        number = block // blocks
        row = (block - number * blocks) * _LANES
        first = start + places[number] * stride + row * columns
        given = number * (columns // 2)
        width = summed[number]
        total = _nothing()
        for chunk in range(0, columns, width):
            sums = _nothing()
            for column in range(chunk, min(chunk + width, columns), _STEP):
                sums = _plus_products(
                    sums, matrices, first + column, columns, inputs, given + column // 2
                )
            total = sums if chunk == 0 else _sum(total, sums)
        put(out, number * rows + row, total, 0)


@generated
def _nothing(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return ir.Constant(vector_of(_FLOAT, _LANES), [0.0] * _LANES)

    return FloatsType(_LANES)(), generate


@generated
def _sum(typing_context: Any, first: Any, second: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return first(first, second), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 numbers: number n of each in vector n."""
    for distance in (1, 2, 4, 8):
        # Of two vectors ``distance`` apart, exchange the numbers that are so far apart.
        lower = [(lane & ~distance) + 16 if lane & distance else lane for lane in range(_LANES)]
        upper = [lane + 16 if lane & distance else lane | distance for lane in range(_LANES)]
        rows = [
            builder.shuffle_vector(
                rows[number & ~distance],
                rows[number | distance],
                ir.Constant(vector_of(_I32, _LANES), upper if number & distance else lower),
            )
            for number in range(_LANES)
        ]
    return rows


@generated
def _plus_products(
    typing_context: Any,
    sums: Any,
    matrices: Any,
    first: Any,
    columns: Any,
    inputs: Any,
    given: Any,
) -> Any:
    """Add the products of 32 columns of 16 rows, the first of which begins at ``first``, with two inputs after the other."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        result, memory, begin, width, pairs, at = arguments
        kind = vector_of(_I32, _LANES)
        # The same columns of the next 16 rows: as many streams as there are rows are more than processors see by themselves.
        ahead = builder.mul(width, _I64(2 * _LANES))
        rows = []
        for lane in range(_LANES):
            place = builder.add(begin, builder.mul(width, _I64(lane)))
            offset = builder.mul(place, _I64(2))
            rows.append(
                builder.load(address(context, builder, sig.args[1], memory, offset, kind), align=1)
            )
            fetch_ahead(context, builder, sig.args[1], memory, offset, ahead)
        instruction = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(result.type, [result.type, kind, kind]),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )
        for number, row in enumerate(_transposed(builder, rows)):
            offset = builder.mul(builder.add(at, _I64(number)), _I64(4))
            pair = builder.load(address(context, builder, sig.args[4], pairs, offset, _I32))
            result = builder.call(instruction, [result, row, repeated(builder, pair, _LANES)])
        return result

    return sums(sums, matrices, types.intp, types.intp, inputs, types.intp), generate
