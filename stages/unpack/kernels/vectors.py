"""Vectors for compiled kernels, and what is loaded from packed tensors: LLVM instructions on 16 numbers at a time.

numba knows neither vectors nor bfloat16 nor half, and whether LLVM vectorises a loop over a block of 32 is a matter of luck. So
kernels name their vectors: ``Bytes`` of 16 (or one) integers of 8 bits, and ``Floats`` of 16 (or one) float32. LLVM makes
of them what the processor has.

Memory is a flat array whose type tells the format of the numbers: ``float32`` is itself, ``uint16`` holds bfloat16, and
``int16`` holds IEEE half. Packed tensors are always arrays of ``uint8``, since files give them any alignment. Indices are
neither checked nor counted from the end.

Nothing here may be contracted or reordered: numba's fast math stays off, and a product is rounded before it is added to.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = [
    "BytesType",
    "FloatsType",
    "address",
    "byte_at",
    "bytes1_at",
    "bytes16_at",
    "fetch_ahead",
    "generated",
    "half_at",
    "halved_exponent_at",
    "packed_scope",
    "repeated",
    "same",
    "scale_at",
    "short_at",
    "vector_of",
]

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_BFLOAT, _IEEE_HALF = types.uint16, types.int16
_VECTOR_BYTES = 16
# Some microseconds of unpacking. Half of it is too little for products, twice as much brings no more.
_AHEAD_BYTES = 2048


class BytesType(types.Type):
    """So many integers of 8 bits in a vector; what they mean is up to what is done with them."""

    def __init__(self, lanes: int) -> None:
        super().__init__(name=f"Bytes{lanes}")
        self.lanes = lanes


class FloatsType(types.Type):
    """So many float32 in a vector."""

    def __init__(self, lanes: int) -> None:
        super().__init__(name=f"Floats{lanes}")
        self.lanes = lanes


def generated(function: Callable[..., Any]) -> Any:
    """Make ``function`` a call in kernels: it gets the arguments' types, and returns a signature and a generator of code."""
    return intrinsic(function)


def vector_of(element: Any, lanes: int) -> Any:
    """Return LLVM's type of ``lanes`` numbers."""
    return ir.VectorType(element, lanes)


@register_model(BytesType)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, vector_of(_I8, kind.lanes))


@register_model(FloatsType)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, vector_of(_FLOAT, kind.lanes))


def repeated(builder: Any, number: Any, lanes: int) -> Any:
    """Return the vector that holds ``number`` in every lane."""
    kind = vector_of(number.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _I32(0))
    order = ir.Constant(vector_of(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), order)


def same(value: Any, number: int, bits: int = 32) -> Any:
    """Return the constant ``number``, as often as ``value`` has lanes."""
    return ir.Constant(vector_of(ir.IntType(bits), value.type.count), [number] * value.type.count)


# Memory


def packed_scope(module: Any) -> Any:
    """Return the alias scope of packed bytes: LLVM then knows that a store to the output changes none of them."""
    domain = module.add_metadata(["layerstream.stages.unpack"])
    return module.add_metadata([module.add_metadata(["packed", domain])])


def address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, kind: Any) -> Any:
    """Return the address ``offset`` bytes into an array, as that of a ``kind``."""
    data = context.make_array(array_type)(context, builder, array).data
    return cgutils.pointer_add(builder, data, offset, kind.as_pointer())


def fetch_ahead(
    context: Any, builder: Any, array_type: Any, array: Any, offset: Any, distance: Any = None
) -> None:
    """Have the processor fetch what is needed soon, when bytes at ``offset`` are used: it need not exist.

    Processors guess that, but not with confidence while results stay in their caches: products of weights in RAM took 1.9
    to 2.7 times as long (Q8_0 to Q4_0, an Intel Xeon with AMX), and unpacking of tiles of 2 MiB up to three times as long.
    """
    arguments = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, arguments, "llvm.prefetch.p0i8")
    ahead = builder.add(offset, _I64(_AHEAD_BYTES) if distance is None else distance)
    # To be read, into all caches, as data.
    kinds = _I32(0), _I32(3), _I32(1)
    builder.call(fetch, [address(context, builder, array_type, array, ahead, _I8), *kinds])


def _loader(kind: Any, result: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic ``(bytes, offset) -> result`` that loads ``kind`` and converts it."""

    def at(typing_context: Any, data: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            array, place = arguments
            place_of = address(context, builder, sig.args[0], array, place, kind)
            loaded = builder.load(place_of, align=1)
            loaded.set_metadata("alias.scope", packed_scope(builder.module))
            if isinstance(kind, ir.VectorType) and kind.count == _VECTOR_BYTES:
                fetch_ahead(context, builder, sig.args[0], array, place)
            return convert(builder, loaded)

        return result(data, types.intp), generate

    return generated(at)


def _unsigned(builder: Any, value: Any) -> Any:
    return builder.zext(value, _I64)


def _single(builder: Any, value: Any) -> Any:
    magnitude = builder.and_(value, _I32(0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, _I32(0x7F800000))
    return builder.bitcast(builder.select(is_nan, _I32(0x7FC00000), value), _FLOAT)


def _half(builder: Any, value: Any) -> Any:
    # Of 16 bits. NaN is found among integers, which is cheaper than among floats.
    magnitude = builder.and_(value, _I16(0x7FFF))
    is_nan = builder.icmp_unsigned(">", magnitude, _I16(0x7C00))
    half = builder.bitcast(builder.select(is_nan, _I16(0x7E00), value), _HALF)
    return builder.fpext(half, _FLOAT)


def _bfloat(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _FLOAT)


def _exponent(builder: Any, value: Any) -> Any:
    """2^(byte - 127), as torch computes it in float32: 0 is a subnormal number, 255 is infinite."""
    bits = builder.shl(builder.zext(value, _I32), _I32(23))
    is_zero = builder.icmp_unsigned("==", value, _I8(0))
    return builder.bitcast(builder.select(is_zero, _I32(1 << 22), bits), _FLOAT)


def _halved_exponent(builder: Any, value: Any) -> Any:
    """2^(byte - 128): finite for every byte."""
    bits = builder.shl(builder.sub(builder.zext(value, _I32), _I32(1)), _I32(23))
    small = builder.shl(_I32(1 << 21), builder.zext(value, _I32))
    is_small = builder.icmp_unsigned("<", value, _I8(2))
    return builder.bitcast(builder.select(is_small, small, bits), _FLOAT)


def _nan_exponent(builder: Any, value: Any) -> Any:
    """As ``_exponent``, but 255 is NaN, as ``float8_e8m0fnu`` has it."""
    is_nan = builder.icmp_unsigned("==", value, _I8(255))
    nan = builder.bitcast(_I32(0x7FC00000), _FLOAT)
    return builder.select(is_nan, nan, _exponent(builder, value))


# Integers come as 64 bits: numba's arithmetic has no narrower ones, and mixes signed and unsigned into floats.
byte_at = _loader(_I8, types.int64, _unsigned)
short_at = _loader(_I16, types.int64, _unsigned)
half_at = _loader(_I16, types.float32, _half)
halved_exponent_at = _loader(_I8, types.float32, _halved_exponent)
bytes16_at = _loader(vector_of(_I8, 16), BytesType(16), lambda _, value: value)
bytes1_at = _loader(vector_of(_I8, 1), BytesType(1), lambda _, value: value)

_SCALES = {
    types.float32: (_I32, 4, _single),
    _BFLOAT: (_I16, 2, _bfloat),
    _IEEE_HALF: (_I16, 2, _half),
    types.uint8: (_I8, 1, _exponent),
    types.int8: (_I8, 1, _nan_exponent),
    types.uint32: (_I8, 1, _halved_exponent),
}


@generated
def scale_at(typing_context: Any, like: Any, scales: Any, index: Any) -> Any:
    """Load scale number ``index`` as float32. The type of ``like`` tells the format: see ``scaled_rows.SCALES``."""
    kind, size, convert = _SCALES[like.dtype]

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        _, array, place = arguments
        offset = builder.mul(place, _I64(size))
        place_of = address(context, builder, sig.args[1], array, offset, kind)
        loaded = builder.load(place_of, align=1)
        loaded.set_metadata("alias.scope", packed_scope(builder.module))
        return convert(builder, loaded)

    return types.float32(like, scales, types.intp), generate
