"""The numbers of matrices with scales of their own, as a product wants them: 64 at a time, without their scale."""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from layerstream.stages.unpack.kernels.lanes import chosen, half_bits_to_floats
from layerstream.stages.unpack.kernels.vectors import (
    BytesType,
    FloatsType,
    address,
    fetch_ahead,
    generated,
    packed_scope,
    same,
    vector_of,
)

__all__ = ["factors", "has_nan", "largest", "no_bytes64", "unit"]

_I8, _I16, _I64 = (ir.IntType(bits) for bits in (8, 16, 64))
_FLOAT = ir.FloatType()
_BYTE = 8
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class _Factors(NamedTuple):
    bits: int
    convert: Callable[[Any, Any], Any]
    unit: float
    """What sums of products are multiplied with afterwards. It is a power of two: a multiplication less for each number."""


def _signed(builder: Any, value: Any) -> Any:
    return builder.sitofp(value, vector_of(_FLOAT, 16))


def _less(zero: int) -> Callable[[Any, Any], Any]:
    return lambda builder, value: _signed(builder, builder.sub(value, same(value, zero, 8)))


def _levels(builder: Any, value: Any) -> Any:
    return _signed(builder, chosen(builder, value, _E2M1_DOUBLED))


def _fp8_e4m3(builder: Any, value: Any) -> Any:
    """2^-8 times the number; NaN is 480, and has to be looked for: see ``has_nan``."""
    wide = builder.shl(builder.sext(value, vector_of(_I16, 16)), same(value, 7, 16))
    return half_bits_to_floats(builder, builder.and_(wide, same(value, 0xBF80, 16)))


def _fp8_e5m2(builder: Any, value: Any) -> Any:
    wide = builder.zext(value, vector_of(_I16, 16))
    return half_bits_to_floats(builder, builder.shl(wide, same(wide, 8, 16)))


# What bytes mean, by the type of an array: see ``scaled_rows.NUMBERS``.
_FORMATS = {
    types.uint8: _Factors(8, _fp8_e4m3, 2.0**8),
    types.uint16: _Factors(8, _fp8_e5m2, 1.0),
    types.int8: _Factors(8, _signed, 1.0),
    types.uint32: _Factors(8, _less(128), 1.0),
    types.int16: _Factors(4, _less(8), 1.0),
    types.int32: _Factors(4, _levels, 0.5),
    types.int64: _Factors(4, _levels, 1.0),
}


def _loaded(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, kind: Any) -> Any:
    loaded = builder.load(address(context, builder, array_type, array, offset, kind), align=1)
    loaded.set_metadata("alias.scope", packed_scope(builder.module))
    return loaded


def _halves(builder: Any, both: Any) -> list[Any]:
    """Numbers of four bits, in order: the lower bits of a byte come first."""
    parts = builder.and_(both, same(both, 15, 8)), builder.lshr(both, same(both, 4, 8))
    order = [[start + lane // 2 + lane % 2 * 16 for lane in range(16)] for start in (0, 8)]
    kind = vector_of(ir.IntType(32), 16)
    return [builder.shuffle_vector(*parts, ir.Constant(kind, each)) for each in order]


@generated
def factors(typing_context: Any, like: Any, data: Any, row_at: Any, column: Any) -> Any:
    """64 numbers from ``column`` on, of the row that begins at byte ``row_at``: four vectors of them, each less its unit."""
    form = _FORMATS[like.dtype]

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        _, array, begin, place = arguments
        at = builder.add(begin, builder.udiv(place, _I64(_BYTE // form.bits)))
        found: list[Any] = []
        fetch_ahead(context, builder, sig.args[1], array, at)
        for offset in range(0, 8 * form.bits, 16):
            where = builder.add(at, _I64(offset))
            loaded = _loaded(context, builder, sig.args[1], array, where, vector_of(_I8, 16))
            found += [loaded] if form.bits == _BYTE else _halves(builder, loaded)
        return cgutils.pack_array(builder, [form.convert(builder, each) for each in found])

    result = types.UniTuple(FloatsType(16), 4)
    return result(like, data, types.intp, types.intp), generate


@generated
def unit(typing_context: Any, like: Any) -> Any:
    """What sums with ``factors`` have to be multiplied with."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return ir.Constant(_FLOAT, _FORMATS[like.dtype].unit)

    return types.float32(like), generate


# NaN among numbers of e4m3


@generated
def no_bytes64(typing_context: Any) -> Any:
    """64 zeros."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return ir.Constant(vector_of(_I8, 64), [0] * 64)

    return BytesType(64)(), generate


@generated
def largest(typing_context: Any, like: Any, so_far: Any, data: Any, place: Any) -> Any:
    """The largest magnitudes among 64 lanes and the next 64 bytes, where they tell of NaN; otherwise it costs nothing."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        _, seen, array, offset = arguments
        if like.dtype != types.uint8:
            return seen
        kind = vector_of(_I8, 64)
        loaded = _loaded(context, builder, sig.args[2], array, offset, kind)
        magnitude = builder.and_(loaded, same(loaded, 0x7F, 8))
        is_larger = builder.icmp_unsigned(">", magnitude, seen)
        return builder.select(is_larger, magnitude, seen)

    return so_far(like, so_far, data, types.intp), generate


@generated
def has_nan(typing_context: Any, seen: Any) -> Any:
    """Whether the largest magnitudes are those of NaN, all ones."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        value = arguments[0]
        is_nan = builder.icmp_unsigned("==", value, same(value, 0x7F, 8))
        bits = builder.bitcast(is_nan, _I64)
        return builder.icmp_unsigned("!=", bits, _I64(0))

    return types.boolean(seen), generate
