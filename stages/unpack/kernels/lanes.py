"""What kernels do with vectors: arithmetic, and conversions of packed numbers to float32, all of them exact."""

import operator
import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin

from layerstream.stages.unpack.kernels.vectors import (
    BytesType,
    FloatsType,
    generated,
    repeated,
    same,
    vector_of,
)

__all__ = [
    "bare_numbers",
    "chosen",
    "conversion",
    "float_of",
    "floats",
    "half_bits_to_floats",
    "interleaved_high",
    "interleaved_low",
    "iq4_levels",
    "lanes_of_bits",
    "less",
    "mxfp4_levels",
    "numbers",
    "signed_floats",
    "spread",
    "unit_of",
]

_I1, _I8, _I16, _I32 = (ir.IntType(bits) for bits in (1, 8, 16, 32))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()


def _operator(function: Any, kind: Any, scalar: Any, instruction: str) -> None:
    """Define ``function`` for two vectors of ``kind``, and for a vector and a ``scalar``."""

    class _VectorOperation(AbstractTemplate):
        def generic(self, args: Any, _: Any) -> Any:
            left, right = args
            if isinstance(left, kind) and (left == right or isinstance(right, types.Number)):
                return signature(left, left, left if left == right else scalar)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, right = args
        if sig.args[1] == scalar:
            if scalar == types.int64:
                right = builder.trunc(right, _I8)
            right = repeated(builder, right, left.type.count)
        return getattr(builder, instruction)(left, right)

    infer_global(function)(_VectorOperation)
    lower_builtin(function, kind, kind)(lower)
    lower_builtin(function, kind, scalar)(lower)


# Shifts are those of unsigned bytes; the others do not care. Sums of bytes wrap.
for _function, _instruction in (
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.xor, "xor"),
    (operator.rshift, "lshr"),
    (operator.lshift, "shl"),
    (operator.add, "add"),
    (operator.sub, "sub"),
):
    _operator(_function, BytesType, types.int64, _instruction)
for _function, _instruction in (
    (operator.mul, "fmul"),
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
):
    _operator(_function, FloatsType, types.float32, _instruction)


def conversion(convert: Callable[[Any, Any], Any], result: Any = FloatsType) -> Any:
    """Return an intrinsic that turns ``Bytes`` into as many numbers of ``result``."""

    def of(typing_context: Any, data: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            return convert(builder, arguments[0])

        return result(data.lanes)(data), generate

    return generated(of)


def half_bits_to_floats(builder: Any, bits: Any) -> Any:
    """Return the IEEE halves ``bits`` (16 bits each) as float32.

    Formats of 8 and 4 bits have the fields of a half, but narrower ones and another bias. Converting from half is exact and
    as fast for subnormal numbers as for others; the same by way of float32 is slow on some processors.
    """
    lanes = bits.type.count
    return builder.fpext(builder.bitcast(bits, vector_of(_HALF, lanes)), vector_of(_FLOAT, lanes))


_BYTE_SHUFFLE = "llvm.x86.ssse3.pshuf.b.128"


def chosen(builder: Any, value: Any, levels: Sequence[int]) -> Any:
    """Return, for each byte of 0 to 15, that one of 16 levels."""
    if platform.machine() in {"x86_64", "AMD64"} and value.type.count == 16:
        # Every processor that converts halves has this instruction of SSSE3.
        table = ir.Constant(value.type, list(levels))
        kind = ir.FunctionType(value.type, [value.type, value.type])
        shuffle = cgutils.get_or_insert_function(builder.module, kind, _BYTE_SHUFFLE)
        return builder.call(shuffle, [table, value])
    # Anywhere else choose bit by bit: 15 choices for 16 numbers.
    choices = [same(value, level, 8) for level in levels]
    for bit in range(4):
        is_set = builder.icmp_unsigned(
            "!=", builder.and_(value, same(value, 1 << bit, 8)), same(value, 0, 8)
        )
        pairs = zip(choices[::2], choices[1::2], strict=True)
        choices = [builder.select(is_set, odd, even) for even, odd in pairs]
    return choices[0]


def _fp8_e4m3(builder: Any, value: Any) -> Any:
    wide = builder.shl(builder.sext(value, vector_of(_I16, value.type.count)), same(value, 7, 16))
    # The sign stands in the two upper bits: only the first is a half's.
    half = builder.and_(wide, same(value, 0xBF80, 16))
    # All ones are NaN in e4m3, which has no infinities.
    ones = builder.or_(value, same(value, 0x80, 8))
    is_nan = builder.icmp_unsigned("==", ones, same(value, 0xFF, 8))
    return half_bits_to_floats(builder, builder.select(is_nan, same(value, 0x7E00, 16), half))


def _fp8_e5m2(builder: Any, value: Any) -> Any:
    wide = builder.zext(value, vector_of(_I16, value.type.count))
    return half_bits_to_floats(builder, builder.shl(wide, same(wide, 8, 16)))


def _fp4(builder: Any, value: Any, halves: Sequence[int]) -> Any:
    """Numbers whose IEEE halves have an upper byte only: those of eight magnitudes, and with the sign."""
    upper = chosen(builder, value, [*halves, *(half | 0x80 for half in halves)])
    wide = builder.zext(upper, vector_of(_I16, value.type.count))
    return half_bits_to_floats(builder, builder.shl(wide, same(wide, 8, 16)))


_E2M1 = (0x00, 0x38, 0x3C, 0x3E, 0x40, 0x42, 0x44, 0x46)
_DOUBLED_E2M1 = (0x00, 0x3C, 0x40, 0x42, 0x44, 0x46, 0x48, 0x4A)


def _signed(builder: Any, value: Any) -> Any:
    return builder.sitofp(value, vector_of(_FLOAT, value.type.count))


def _shifted(builder: Any, value: Any, zero: int) -> Any:
    return _signed(builder, builder.sub(value, same(value, zero, 8)))


floats = conversion(
    lambda builder, value: builder.uitofp(value, vector_of(_FLOAT, value.type.count))
)
signed_floats = conversion(_signed)

# What bytes mean, by the type of an array: the conversion, and what has to be multiplied with afterwards.
_NUMBERS: dict[Any, tuple[Callable[[Any, Any], Any], float]] = {
    types.uint8: (_fp8_e4m3, 2.0**8),
    types.uint16: (_fp8_e5m2, 1.0),
    types.int8: (_signed, 1.0),
    types.uint32: (lambda builder, value: _shifted(builder, value, 128), 1.0),
    types.int16: (lambda builder, value: _shifted(builder, value, 8), 1.0),
    types.int32: (lambda builder, value: _fp4(builder, value, _E2M1), 1.0),
    # Twice the number, which is an integer, for half the scale, which is finite.
    types.int64: (lambda builder, value: _fp4(builder, value, _DOUBLED_E2M1), 1.0),
}


@generated
def bare_numbers(typing_context: Any, like: Any, data: Any) -> Any:
    """As ``numbers``, divided by ``unit_of``: a multiplication less."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return _NUMBERS[like.dtype][0](builder, arguments[1])

    return FloatsType(data.lanes)(like, data), generate


@generated
def unit_of(typing_context: Any, like: Any) -> Any:
    """The power of two that ``bare_numbers`` leave out."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return ir.Constant(_FLOAT, _NUMBERS[like.dtype][1])

    return types.float32(like), generate


@generated
def numbers(typing_context: Any, like: Any, data: Any) -> Any:
    """Turn bytes into float32. The type of ``like`` tells what they mean: see ``scaled_rows.NUMBERS``."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        convert, unit = _NUMBERS[like.dtype]
        value = convert(builder, arguments[1])
        factor = ir.Constant(value.type, [unit] * data.lanes)
        return value if unit == 1.0 else builder.fmul(value, factor)

    return FloatsType(data.lanes)(like, data), generate


@generated
def less(typing_context: Any, values: Any, zeros: Any, zero: Any) -> Any:
    """Subtract a zero point. An array ``zeros`` of float32 tells that there are none, and costs nothing."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        vector = arguments[0]
        if zeros.dtype == types.float32:
            return vector
        return builder.fsub(vector, repeated(builder, arguments[2], vector.type.count))

    return values(values, zeros, types.float32), generate


@generated
def float_of(typing_context: Any, number: Any) -> Any:
    """One integer as float32, exact below 2^24."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.sitofp(builder.trunc(arguments[0], _I32), _FLOAT)

    return types.float32(types.int64), generate


@generated
def lanes_of_bits(typing_context: Any, number: Any) -> Any:
    """The lower 16 bits of an integer as 16 bytes of 0 or 1, the lowest first."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        bits = builder.bitcast(builder.trunc(arguments[0], _I16), vector_of(_I1, 16))
        return builder.zext(bits, vector_of(_I8, 16))

    return BytesType(16)(types.int64), generate


@generated
def spread(typing_context: Any, values: Any, lane: Any) -> Any:
    """Return a vector of which every lane is number ``lane`` of ``values``."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        vector, index = arguments
        return repeated(builder, builder.extract_element(vector, index), vector.type.count)

    return values(values, types.int64), generate


def _interleaved(start: int) -> Any:
    def of(typing_context: Any, low: Any, high: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            order = [start + lane // 2 + lane % 2 * 16 for lane in range(16)]
            return builder.shuffle_vector(*arguments, ir.Constant(vector_of(_I32, 16), order))

        return low(low, high), generate

    return generated(of)


interleaved_low, interleaved_high = _interleaved(0), _interleaved(8)
"""The first, and the second, 16 of ``low[0], high[0], low[1], high[1], ...``."""


def _levels(levels: tuple[int, ...]) -> Any:
    """Return an intrinsic that takes bytes of 0 to 15, and returns the ``levels`` that they stand for, as signed bytes."""
    return conversion(lambda builder, value: chosen(builder, value, levels), BytesType)


iq4_levels = _levels((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
"""The levels of IQ4_NL and IQ4_XS (ggml's ``kvalues_iq4nl``)."""
mxfp4_levels = _levels((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
"""Doubled e2m1 numbers, as ggml has them: without a negative zero."""
