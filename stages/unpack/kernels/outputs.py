"""Where kernels leave their numbers: rounded in an output, or multiplied with inputs and summed.

Rounding does not ask whether a number is NaN, which would be a third of its work: NaN stays NaN as long as the lower 16 bits are
zero. The NaN that arithmetic makes has none, and those that are loaded lose theirs.

Processors with AVX-512 BF16 round to bfloat16 in one instruction, but take subnormal numbers for zero: what cannot be subnormal is
stored by ``put_normal``. Half scales give no such numbers: products, sums and differences of integers with the least half, 2^-24, are no smaller.
"""

from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core import cgutils

from layerstream.stages.unpack.kernels.vectors import (
    FloatsType,
    address,
    generated,
    packed_scope,
    repeated,
    same,
    vector_of,
)

__all__ = ["lane_sum", "put", "put_both", "put_normal", "rounded", "total"]

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_IEEE_HALF = types.int16


def _rounded_bfloat_bits(builder: Any, value: Any) -> Any:
    """Round to the nearest bfloat16, ties to even, in the upper half of 32 bits."""
    bits = builder.bitcast(value, vector_of(_I32, value.type.count))
    odd = builder.and_(builder.lshr(bits, same(value, 16)), same(value, 1))
    return builder.add(builder.add(bits, same(value, 0x7FFF)), odd)


def _rounded_bfloats(builder: Any, vectors: Any) -> Any:
    """Round two vectors to the nearest bfloat16, ties to even, as 32 integers of 16 bits."""
    kind = vector_of(_I16, 32)
    halves = [builder.bitcast(each, kind) for each in vectors]
    lower, upper = (
        builder.shuffle_vector(*halves, ir.Constant(vector_of(_I32, 32), list(range(at, 64, 2))))
        for at in (0, 1)
    )
    # More than half of the last place is left over, or just half of it beside an odd number.
    half = builder.sub(same(upper, 0x8000, 16), builder.and_(upper, same(upper, 1, 16)))
    is_more = builder.icmp_unsigned(">", lower, half)
    return builder.add(upper, builder.zext(is_more, kind))


# From this version of LLVM on, the instruction's result is of that type.
_WITH_BFLOAT = (16,)


class _Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


def _rounded_by_instruction(builder: Any, vectors: Any) -> Any:
    """As ``_rounded_bfloats``, for numbers that are not subnormal."""
    first, second = vectors
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector_of(_Bfloat(), 32), [first.type, first.type]),
        "llvm.x86.avx512bf16.cvtne2ps2bf16.512",
    )
    return builder.bitcast(builder.call(function, [second, first]), vector_of(_I16, 32))


def _as_held(builder: Any, value: Any, element: Any) -> Any:
    """Round a vector of float32 to what an array of ``element`` can hold, as float32."""
    if element == types.float32:
        return value
    if element == _IEEE_HALF:
        half = builder.fptrunc(value, vector_of(_HALF, value.type.count))
        return builder.fpext(half, value.type)
    bits = builder.and_(_rounded_bfloat_bits(builder, value), same(value, 0xFFFF0000))
    return builder.bitcast(bits, value.type)


@generated
def rounded(typing_context: Any, like: Any, value: Any) -> Any:
    """Round ``value`` (a vector or one float32) to what an array of the type of ``like`` can hold, as float32."""
    single = not isinstance(value, FloatsType)

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        vector = repeated(builder, arguments[1], 1) if single else arguments[1]
        held = _as_held(builder, vector, like.dtype)
        return builder.extract_element(held, _I32(0)) if single else held

    kind = types.float32 if single else value
    return kind(like, kind), generate


def _put(typing_context: Any, out: Any, place: Any, value: Any, chain: Any) -> Any:
    """Round the vector ``value`` to the type of ``out``, and store it from index ``place`` on; or add to sums of products.

    Sums are a tuple (sums, inputs, columns, tokens): see ``products``. ``place`` is then a column, and ``chain`` one of four sums: the next
    addition should be to another, for which it need not wait.
    """
    if isinstance(out, types.BaseTuple):
        return types.none(out, types.intp, value, types.intp), _add_products

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        array, index, vector, _ = arguments
        lanes = vector.type.count
        if out.dtype == types.float32:
            stored = vector
        elif out.dtype == _IEEE_HALF:
            stored = builder.fptrunc(vector, vector_of(_HALF, lanes))
        else:
            bits = builder.lshr(_rounded_bfloat_bits(builder, vector), same(vector, 16))
            stored = builder.trunc(bits, vector_of(_I16, lanes))
        offset = builder.mul(index, _I64(out.dtype.bitwidth // 8))
        _store(builder, stored, address(context, builder, out, array, offset, stored.type))
        return context.get_dummy_value()

    return types.none(out, types.intp, value, types.intp), generate


put = generated(_put)


def _put_both(*, are_normal: bool) -> Any:
    def of(typing_context: Any, out: Any, place: Any, first: Any, second: Any, chain: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            memory, index, *vectors, number = arguments
            if not isinstance(out, types.BaseTuple) and out.dtype == types.uint16:
                # The processor that code is made for, in the words of numba's cache.
                *_, features = context.codegen().magic_tuple()
                by_instruction = (
                    are_normal
                    and "+avx512bf16" in features.split(",")
                    and llvm_version_info >= _WITH_BFLOAT
                )
                stored = (_rounded_by_instruction if by_instruction else _rounded_bfloats)(
                    builder, vectors
                )
                offset = builder.mul(index, _I64(2))
                _store(builder, stored, address(context, builder, out, memory, offset, stored.type))
                return context.get_dummy_value()
            signature, store = _put(typing_context, out, place, first, chain)
            for step, vector in enumerate(vectors):
                at = builder.add(index, _I64(16 * step))
                chain_of = builder.add(number, _I64(step))
                store(context, builder, signature, (memory, at, vector, chain_of))
            return context.get_dummy_value()

        return types.none(out, types.intp, first, second, types.intp), generate

    return generated(of)


put_both = _put_both(are_normal=False)
"""As ``put`` for two vectors of 16, one behind the other: narrowing both at once takes fewer instructions."""
put_normal = _put_both(are_normal=True)
"""As ``put_both``, for vectors without subnormal numbers."""


def _store(builder: Any, value: Any, where: Any) -> None:
    builder.store(value, where, align=1).set_metadata("noalias", packed_scope(builder.module))


_CHAINS = 4


def _add_products(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
    (state, place, value, chain), kinds = arguments, sig.args[0].types
    sums, inputs, columns = (builder.extract_value(state, index) for index in range(3))
    kind = value.type
    name = f"llvm.fmuladd.v{kind.count}f32"
    multiply_add = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind, kind, kind]), name
    )
    for token in range(len(kinds[3])):
        index = builder.add(builder.mul(columns, _I64(token)), place)
        offset = builder.mul(index, _I64(4))
        factor = builder.load(address(context, builder, kinds[1], inputs, offset, kind), align=1)
        factor.set_metadata("alias.scope", packed_scope(builder.module))
        number = builder.add(chain, _I64(token * _CHAINS))
        offset = builder.mul(number, _I64(64))
        where = address(context, builder, kinds[0], sums, offset, kind)
        total = builder.call(multiply_add, [value, factor, builder.load(where, align=1)])
        _store(builder, total, where)
    return context.get_dummy_value()


@generated
def total(typing_context: Any, sums: Any, token: Any) -> Any:
    """Add up the sums of one token."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        array, number = arguments
        kind = vector_of(_FLOAT, 16)
        chains = []
        for chain in range(_CHAINS):
            index = builder.add(builder.mul(number, _I64(_CHAINS)), _I64(chain))
            offset = builder.mul(index, _I64(64))
            where = address(context, builder, sums, array, offset, kind)
            chains.append(builder.load(where, align=1))
        added = builder.fadd(builder.fadd(*chains[:2]), builder.fadd(*chains[2:]))
        return lane_sum(builder, added)

    return types.float32(sums, types.int64), generate


def lane_sum(builder: Any, value: Any) -> Any:
    """Add up the 16 lanes of a vector of float32."""
    for half in (8, 4, 2, 1):
        parts = [
            ir.Constant(vector_of(_I32, half), list(range(start, start + half)))
            for start in (0, half)
        ]
        value = builder.fadd(*(builder.shuffle_vector(value, value, part) for part in parts))
    return builder.extract_element(value, _I32(0))
