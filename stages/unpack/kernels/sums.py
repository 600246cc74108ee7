"""Sums of products that stay in the processor's registers: tuples of vectors, four for each token."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from layerstream.stages.unpack.kernels.outputs import lane_sum
from layerstream.stages.unpack.kernels.vectors import (
    FloatsType,
    address,
    generated,
    packed_scope,
    repeated,
    vector_of,
)

__all__ = ["less_zeros", "no_sums", "no_totals", "plus", "plus_scaled", "scaled", "store_totals"]

_I64 = ir.IntType(64)
_KIND = vector_of(ir.FloatType(), 16)
# Sums of one token: while one addition is under way, others begin.
_CHAINS = 4


def _multiply_add(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    kind = ir.FunctionType(_KIND, [_KIND] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32")
    return builder.call(function, [left, right, addend])


def _parts(builder: Any, values: Any) -> list[Any]:
    return [builder.extract_value(values, index) for index in range(values.type.count)]


def _zeros(each: int) -> Any:
    def of(typing_context: Any, tokens: Any) -> Any:
        count = len(tokens) * each

        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            return cgutils.pack_array(builder, [ir.Constant(_KIND, [0.0] * 16)] * count)

        return types.UniTuple(FloatsType(16), count)(tokens), generate

    return generated(of)


no_sums, no_totals = _zeros(_CHAINS), _zeros(1)
"""Of nothing, for each token of a tuple."""


@generated
def plus(
    typing_context: Any, sums: Any, values: Any, inputs: Any, columns: Any, column: Any
) -> Any:
    """Add the products of 64 numbers with each token's inputs from ``column`` on."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        before, numbers, array, width, first = arguments
        result = _parts(builder, before)
        for token in range(len(result) // _CHAINS):
            start = builder.add(builder.mul(width, _I64(token)), first)
            for chain, number in enumerate(_parts(builder, numbers)):
                offset = builder.mul(builder.add(start, _I64(16 * chain)), _I64(4))
                where = address(context, builder, sig.args[2], array, offset, _KIND)
                factor = builder.load(where, align=1)
                factor.set_metadata("alias.scope", packed_scope(builder.module))
                index = token * _CHAINS + chain
                result[index] = _multiply_add(builder, number, factor, result[index])
        return cgutils.pack_array(builder, result)

    return sums(sums, values, inputs, types.intp, types.intp), generate


def _by_halves(builder: Any, values: Any, scalars: Any, instruction: str) -> Any:
    """Apply ``instruction`` to the first half of ``values`` with the first scalar, and to the second with the second."""
    both = [repeated(builder, each, 16) for each in scalars]
    parts = _parts(builder, values)
    operate = getattr(builder, instruction)
    pairs = [(each, both[2 * number // len(parts)]) for number, each in enumerate(parts)]
    return cgutils.pack_array(builder, [operate(*pair) for pair in pairs])


@generated
def scaled(typing_context: Any, values: Any, first: Any, second: Any) -> Any:
    """Multiply the first 32 numbers with one scale, and the others with another."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return _by_halves(builder, arguments[0], arguments[1:], "fmul")

    return values(values, types.float32, types.float32), generate


@generated
def less_zeros(typing_context: Any, values: Any, zeros: Any, first: Any, second: Any) -> Any:
    """Subtract one zero point from the first 32 numbers, and another from the others: see ``lanes.less``."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        if zeros.dtype == types.float32:
            return arguments[0]
        return _by_halves(builder, arguments[0], arguments[2:], "fsub")

    return values(values, zeros, types.float32, types.float32), generate


@generated
def plus_scaled(typing_context: Any, totals: Any, sums: Any, unit: Any, scale: Any) -> Any:
    """Add up the sums of each token, and add that, times a unit and a scale, to the totals, one for each token."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        before, chains, power, factor = arguments
        result, parts = _parts(builder, before), _parts(builder, chains)
        factor, power = repeated(builder, factor, 16), repeated(builder, power, 16)
        for token in range(len(result)):
            first, second, third, fourth = parts[token * _CHAINS : (token + 1) * _CHAINS]
            added = builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))
            # A power of two: this product is exact, whereas that with the scale might not be finite.
            added = builder.fmul(added, power)
            result[token] = _multiply_add(builder, added, factor, result[token])
        return cgutils.pack_array(builder, result)

    return totals(totals, sums, types.float32, types.float32), generate


@generated
def store_totals(
    typing_context: Any, out: Any, rows: Any, row: Any, totals: Any, is_nan: Any
) -> Any:
    """Store what the lanes of each token's total add up to, or NaN, in its row of ``rows`` outputs."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        array, width, place, values, missing = arguments
        nan = ir.Constant(ir.FloatType(), float("nan"))
        for token, value in enumerate(_parts(builder, values)):
            index = builder.add(builder.mul(width, _I64(token)), place)
            offset = builder.mul(index, _I64(4))
            where = address(context, builder, sig.args[0], array, offset, nan.type)
            builder.store(builder.select(missing, nan, lane_sum(builder, value)), where)
        return context.get_dummy_value()

    return types.none(out, types.intp, types.intp, totals, types.boolean), generate
