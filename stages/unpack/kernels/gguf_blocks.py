"""GGUF's blocks of 32 numbers with one scale, and IQ4_XS, which has eight of them.

Each kernel writes rows ``begin`` to ``end`` of the output. It takes the packed bytes, which of their rows is the output's first, the
number of blocks in a row, the output, and an array of the type that intermediate results are rounded to. What is stored is rounded by ``put_normal``.
"""

from typing import Any

from layerstream.stages.unpack.kernels.lanes import (
    float_of,
    iq4_levels,
    lanes_of_bits,
    mxfp4_levels,
    signed_floats,
)
from layerstream.stages.unpack.kernels.outputs import put_both, put_normal, rounded
from layerstream.stages.unpack.kernels.vectors import (
    byte_at,
    bytes16_at,
    half_at,
    halved_exponent_at,
    short_at,
)

__all__ = ["iq4_nl", "iq4_xs", "mxfp4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


def q8_0(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: scale (half), 32 signed bytes."""
    at = (first + begin) * blocks * 34
    for start in range(begin * blocks * 32, end * blocks * 32, 32):
        chain = start >> 4 & 2
        scale = rounded(like, half_at(packed, at))
        put_normal(
            out,
            start,
            signed_floats(bytes16_at(packed, at + 2)) * scale,
            signed_floats(bytes16_at(packed, at + 18)) * scale,
            chain,
        )
        at += 34


def q4_0(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: scale (half), 16 bytes; the lower four bits are numbers 0 to 15, the upper 16 to 31."""
    at = (first + begin) * blocks * 18
    for start in range(begin * blocks * 32, end * blocks * 32, 32):
        chain = start >> 4 & 2
        scale = rounded(like, half_at(packed, at))
        quants = bytes16_at(packed, at + 2)
        put_normal(
            out,
            start,
            signed_floats((quants & 15) - 8) * scale,
            signed_floats((quants >> 4) - 8) * scale,
            chain,
        )
        at += 18


def q4_1(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: scale, minimum (halves), 16 bytes as in Q4_0."""
    at = (first + begin) * blocks * 20
    for start in range(begin * blocks * 32, end * blocks * 32, 32):
        chain = start >> 4 & 2
        scale = rounded(like, half_at(packed, at))
        minimum = rounded(like, half_at(packed, at + 2))
        quants = bytes16_at(packed, at + 4)
        put_normal(
            out,
            start,
            rounded(like, signed_floats(quants & 15) * scale) + minimum,
            rounded(like, signed_floats(quants >> 4) * scale) + minimum,
            chain,
        )
        at += 20


def q5_0(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: scale (half), the fifth bits of 32 numbers, 16 bytes as in Q4_0."""
    at = (first + begin) * blocks * 22
    for start in range(begin * blocks * 32, end * blocks * 32, 32):
        chain = start >> 4 & 2
        scale = rounded(like, half_at(packed, at))
        quants = bytes16_at(packed, at + 6)
        low = (quants & 15) | (lanes_of_bits(short_at(packed, at + 2)) << 4)
        high = (quants >> 4) | (lanes_of_bits(short_at(packed, at + 4)) << 4)
        put_normal(
            out, start, signed_floats(low - 16) * scale, signed_floats(high - 16) * scale, chain
        )
        at += 22


def q5_1(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: scale, minimum (halves), the fifth bits of 32 numbers, 16 bytes as in Q4_0."""
    at = (first + begin) * blocks * 24
    for start in range(begin * blocks * 32, end * blocks * 32, 32):
        chain = start >> 4 & 2
        scale = rounded(like, half_at(packed, at))
        minimum = rounded(like, half_at(packed, at + 2))
        quants = bytes16_at(packed, at + 8)
        low = (quants & 15) | (lanes_of_bits(short_at(packed, at + 4)) << 4)
        high = (quants >> 4) | (lanes_of_bits(short_at(packed, at + 6)) << 4)
        put_normal(
            out,
            start,
            rounded(like, signed_floats(low) * scale) + minimum,
            rounded(like, signed_floats(high) * scale) + minimum,
            chain,
        )
        at += 24


def iq4_nl(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: scale (half), 16 bytes as in Q4_0, whose numbers stand for 16 levels."""
    at = (first + begin) * blocks * 18
    for start in range(begin * blocks * 32, end * blocks * 32, 32):
        chain = start >> 4 & 2
        scale = rounded(like, half_at(packed, at))
        quants = bytes16_at(packed, at + 2)
        put_normal(
            out,
            start,
            signed_floats(iq4_levels(quants & 15)) * scale,
            signed_floats(iq4_levels(quants >> 4)) * scale,
            chain,
        )
        at += 18


def iq4_xs(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block of 256: scale (half), two upper bits of eight scales, their lower four bits, eight times the bytes of IQ4_NL."""
    at = (first + begin) * blocks * 136
    for start in range(begin * blocks * 256, end * blocks * 256, 256):
        scale = rounded(like, half_at(packed, at))
        upper = short_at(packed, at + 2)
        for group in range(8):
            lower = (byte_at(packed, at + 4 + group // 2) >> (group % 2 * 4)) & 15
            factor = lower | ((upper >> (2 * group)) & 3) << 4
            part = rounded(like, scale * float_of(factor - 32))
            quants = bytes16_at(packed, at + 8 + 16 * group)
            place = start + 32 * group
            put_normal(
                out,
                place,
                signed_floats(iq4_levels(quants & 15)) * part,
                signed_floats(iq4_levels(quants >> 4)) * part,
                (group & 1) * 2,
            )
        at += 136


def mxfp4(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: exponent (one byte), 16 bytes as in Q4_0 with e2m1 numbers. All products are exact."""
    at = (first + begin) * blocks * 17
    for start in range(begin * blocks * 32, end * blocks * 32, 32):
        chain = start >> 4 & 2
        scale = halved_exponent_at(packed, at)
        quants = bytes16_at(packed, at + 1)
        put_both(
            out,
            start,
            signed_floats(mxfp4_levels(quants & 15)) * scale,
            signed_floats(mxfp4_levels(quants >> 4)) * scale,
            chain,
        )
        at += 17
