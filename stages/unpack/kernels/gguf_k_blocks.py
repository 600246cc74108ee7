"""GGUF's blocks of 256 numbers in groups of 16 or 32, each with a scale (and minimum) of a few bits: the k-quants.

The kernels' arguments are those of ``gguf_blocks``.
"""

from typing import Any

from layerstream.stages.unpack.kernels.k_scales import q3_scales, six_bits
from layerstream.stages.unpack.kernels.lanes import floats, signed_floats, spread
from layerstream.stages.unpack.kernels.outputs import put, put_normal, rounded
from layerstream.stages.unpack.kernels.vectors import bytes16_at, half_at

__all__ = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def q2_k(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: 16 bytes of scale (lower four bits) and minimum, 64 bytes of four numbers, scale and minimum of them (halves)."""
    at = (first + begin) * blocks * 84
    for start in range(begin * blocks * 256, end * blocks * 256, 256):
        scale = rounded(like, half_at(packed, at + 80))
        minimum = rounded(like, half_at(packed, at + 82))
        both = bytes16_at(packed, at)
        parts = rounded(like, floats(both & 15) * scale)
        least = rounded(like, floats(both >> 4) * minimum)
        # 32 bytes hold 128 numbers: two bits of each byte, then the next two bits.
        for half in range(2):
            for lane in range(2):
                quants = bytes16_at(packed, at + 16 + 32 * half + 16 * lane)
                for field in range(4):
                    group = 8 * half + 2 * field + lane
                    number = floats((quants >> (2 * field)) & 3)
                    number = rounded(like, number * spread(parts, group)) - spread(least, group)
                    put(out, start + 16 * group, number, field)
        at += 84


def q3_k(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: 32 bytes of third bits, 64 bytes of four numbers, 16 scales of six bits, their scale (half)."""
    at = (first + begin) * blocks * 110
    for start in range(begin * blocks * 256, end * blocks * 256, 256):
        scale = rounded(like, half_at(packed, at + 108))
        # From two bytes before the scales on: the last block may be the end of the memory.
        parts = rounded(like, signed_floats(q3_scales(bytes16_at(packed, at + 94))) * scale)
        for half in range(2):
            for lane in range(2):
                quants = bytes16_at(packed, at + 32 + 32 * half + 16 * lane)
                thirds = bytes16_at(packed, at + 16 * lane) >> (4 * half)
                for field in range(4):
                    group = 8 * half + 2 * field + lane
                    # A third bit that is not set takes four away.
                    number = ((quants >> (2 * field)) & 3) + (((thirds >> field) & 1) << 2) - 4
                    number = signed_floats(number) * spread(parts, group)
                    put(out, start + 16 * group, number, field)
        at += 110


def q4_k(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: scale and minimum of eight scales and minima of six bits (12 bytes), 128 bytes of two numbers."""
    at = (first + begin) * blocks * 144
    for start in range(begin * blocks * 256, end * blocks * 256, 256):
        factors = floats(six_bits(bytes16_at(packed, at)))
        parts = rounded(like, factors * half_at(packed, at))
        least = rounded(like, factors * half_at(packed, at + 2))
        # 32 bytes hold 64 numbers: the lower four bits of each byte, then the upper four.
        for pair in range(4):
            quants = (
                bytes16_at(packed, at + 16 + 32 * pair),
                bytes16_at(packed, at + 32 + 32 * pair),
            )
            place, group = start + 64 * pair, 2 * pair
            part, minimum = spread(parts, group), spread(least, group + 8)
            one = rounded(like, floats(quants[0] & 15) * part) - minimum
            two = rounded(like, floats(quants[1] & 15) * part) - minimum
            put_normal(out, place, one, two, 0)
            part, minimum = spread(parts, group + 1), spread(least, group + 9)
            one = rounded(like, floats(quants[0] >> 4) * part) - minimum
            two = rounded(like, floats(quants[1] >> 4) * part) - minimum
            put_normal(out, place + 32, one, two, 2)
        at += 144


def q5_k(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: as Q4_K, with 32 bytes of fifth bits before the numbers: bit n for those of group n."""
    at = (first + begin) * blocks * 176
    for start in range(begin * blocks * 256, end * blocks * 256, 256):
        factors = floats(six_bits(bytes16_at(packed, at)))
        parts = rounded(like, factors * half_at(packed, at))
        least = rounded(like, factors * half_at(packed, at + 2))
        for pair in range(4):
            quants = (
                bytes16_at(packed, at + 48 + 32 * pair),
                bytes16_at(packed, at + 64 + 32 * pair),
            )
            fifths = bytes16_at(packed, at + 16), bytes16_at(packed, at + 32)
            fifths = fifths[0] >> (2 * pair), fifths[1] >> (2 * pair)
            place, group = start + 64 * pair, 2 * pair
            part, minimum = spread(parts, group), spread(least, group + 8)
            one = rounded(like, floats((quants[0] & 15) | (fifths[0] & 1) << 4) * part) - minimum
            two = rounded(like, floats((quants[1] & 15) | (fifths[1] & 1) << 4) * part) - minimum
            put_normal(out, place, one, two, 0)
            part, minimum = spread(parts, group + 1), spread(least, group + 9)
            one = rounded(like, floats((quants[0] >> 4) | (fifths[0] & 2) << 3) * part) - minimum
            two = rounded(like, floats((quants[1] >> 4) | (fifths[1] & 2) << 3) * part) - minimum
            put_normal(out, place + 32, one, two, 2)
        at += 176


def q6_k(begin: int, end: int, packed: Any, first: int, blocks: int, out: Any, like: Any) -> None:
    """Block: 128 bytes of lower four bits, 64 of upper two, 16 scales (signed bytes), their scale (half)."""
    at = (first + begin) * blocks * 210
    for start in range(begin * blocks * 256, end * blocks * 256, 256):
        scales = signed_floats(bytes16_at(packed, at + 192))
        parts = rounded(like, scales * half_at(packed, at + 208))
        for half in range(2):
            # Of 128 numbers, the first 64 have the lower four bits of 64 bytes, the others the upper four.
            for lane in range(4):
                lower = bytes16_at(packed, at + 64 * half + 16 * lane)
                upper = bytes16_at(packed, at + 128 + 32 * half + lane % 2 * 16)
                upper = upper >> (lane // 2 * 2)
                place, group = start + 128 * half + 16 * lane, 8 * half + lane
                number = ((lower & 15) | (upper & 3) << 4) - 32
                put(out, place, signed_floats(number) * spread(parts, group), lane % 2)
                number = ((lower >> 4) | (upper & 48)) - 32
                put(out, place + 64, signed_floats(number) * spread(parts, group + 4), lane % 2 + 2)
        at += 210
