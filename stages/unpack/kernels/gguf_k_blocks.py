"""GGUF's blocks of 256 numbers in groups of 16 or 32, each with a scale (and minimum) of a few bits: the k-quants.

The kernels' arguments are those of ``gguf_blocks``.
"""

from typing import Any

from numba.extending import register_jitable

from layerstream.stages.unpack.kernels.lanes import float_of, floats, signed_floats
from layerstream.stages.unpack.kernels.vectors import (
    byte_at,
    bytes16_at,
    half_at,
    put,
    rounded,
    signed_at,
)

__all__ = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def q2_k(packed: Any, first: int, rows: int, blocks: int, out: Any, like: Any) -> None:
    """Block: 16 bytes of scale (lower four bits) and minimum, 64 bytes of four numbers, scale and minimum of them (halves)."""
    at = first * blocks * 84
    for start in range(0, rows * blocks * 256, 256):
        scale = rounded(like, half_at(packed, at + 80))
        minimum = rounded(like, half_at(packed, at + 82))
        for group in range(16):
            both = byte_at(packed, at + group)
            part = rounded(like, scale * float_of(both & 15))
            least = rounded(like, minimum * float_of(both >> 4))
            # 32 bytes hold 128 numbers: two bits of each byte, then the next two bits.
            quants = bytes16_at(packed, at + 16 + group // 8 * 32 + group % 2 * 16)
            shifted = (quants >> (group % 8 // 2 * 2)) & 3
            put(out, start + 16 * group, rounded(like, floats(shifted) * part) - least)
        at += 84


def q3_k(packed: Any, first: int, rows: int, blocks: int, out: Any, like: Any) -> None:
    """Block: 32 bytes of third bits, 64 bytes of four numbers, 16 scales of six bits, their scale (half)."""
    at = first * blocks * 110
    for start in range(0, rows * blocks * 256, 256):
        scale = rounded(like, half_at(packed, at + 108))
        for group in range(16):
            lower = (byte_at(packed, at + 96 + group % 8) >> (group // 8 * 4)) & 15
            upper = (byte_at(packed, at + 104 + group % 4) >> (group // 4 * 2)) & 3
            part = rounded(like, scale * float_of((lower | upper << 4) - 32))
            quants = bytes16_at(packed, at + 32 + group // 8 * 32 + group % 2 * 16)
            thirds = bytes16_at(packed, at + group % 2 * 16) >> (group // 2)
            # A third bit that is not set takes four away.
            number = ((quants >> (group % 8 // 2 * 2)) & 3) + ((thirds & 1) << 2) - 4
            put(out, start + 16 * group, signed_floats(number) * part)
        at += 110


@register_jitable
def _scale_of_six_bits(packed: Any, at: int, group: int) -> int:
    """Return the scale of ``group``; with ``at`` four bytes on and the last four shifted, its minimum. See ``get_scale_min_k4`` of ggml."""
    if group < 4:
        return byte_at(packed, at + group) & 63  # type: ignore[no-any-return]
    upper = byte_at(packed, at + group - 4) >> 6
    return (byte_at(packed, at + group + 4) & 15) | upper << 4  # type: ignore[no-any-return]


@register_jitable
def _minimum_of_six_bits(packed: Any, at: int, group: int) -> int:
    if group < 4:
        return byte_at(packed, at + group + 4) & 63  # type: ignore[no-any-return]
    upper = byte_at(packed, at + group) >> 6
    return (byte_at(packed, at + group + 4) >> 4) | upper << 4  # type: ignore[no-any-return]


def q4_k(packed: Any, first: int, rows: int, blocks: int, out: Any, like: Any) -> None:
    """Block: scale and minimum of eight scales and minima of six bits (12 bytes), 128 bytes of two numbers."""
    at = first * blocks * 144
    for start in range(0, rows * blocks * 256, 256):
        scale, minimum = half_at(packed, at), half_at(packed, at + 2)
        for group in range(8):
            factor = _scale_of_six_bits(packed, at + 4, group)
            part = rounded(like, scale * float_of(factor))
            factor = _minimum_of_six_bits(packed, at + 4, group)
            least = rounded(like, minimum * float_of(factor))
            # 32 bytes hold 64 numbers: the lower four bits of each byte, then the upper four.
            for lane in range(0, 32, 16):
                quants = bytes16_at(packed, at + 16 + group // 2 * 32 + lane)
                number = (quants >> (group % 2 * 4)) & 15
                place = start + 32 * group + lane
                put(out, place, rounded(like, floats(number) * part) - least)
        at += 144


def q5_k(packed: Any, first: int, rows: int, blocks: int, out: Any, like: Any) -> None:
    """Block: as Q4_K, with 32 bytes of fifth bits before the numbers: bit n for those of group n."""
    at = first * blocks * 176
    for start in range(0, rows * blocks * 256, 256):
        scale, minimum = half_at(packed, at), half_at(packed, at + 2)
        for group in range(8):
            factor = _scale_of_six_bits(packed, at + 4, group)
            part = rounded(like, scale * float_of(factor))
            factor = _minimum_of_six_bits(packed, at + 4, group)
            least = rounded(like, minimum * float_of(factor))
            for lane in range(0, 32, 16):
                quants = bytes16_at(packed, at + 48 + group // 2 * 32 + lane)
                fifths = (bytes16_at(packed, at + 16 + lane) >> group) & 1
                number = ((quants >> (group % 2 * 4)) & 15) | fifths << 4
                place = start + 32 * group + lane
                put(out, place, rounded(like, floats(number) * part) - least)
        at += 176


def q6_k(packed: Any, first: int, rows: int, blocks: int, out: Any, like: Any) -> None:
    """Block: 128 bytes of lower four bits, 64 of upper two, 16 scales (signed bytes), their scale (half)."""
    at = first * blocks * 210
    for start in range(0, rows * blocks * 256, 256):
        scale = half_at(packed, at + 208)
        for group in range(16):
            part = rounded(like, scale * float_of(signed_at(packed, at + 192 + group)))
            # Of 128 numbers, the first 64 have the lower four bits of 64 bytes, the others the upper four.
            lower = bytes16_at(packed, at + group // 8 * 64 + group % 4 * 16)
            upper = bytes16_at(packed, at + 128 + group // 8 * 32 + group % 2 * 16)
            number = ((lower >> (group % 8 // 4 * 4)) & 15) | (
                (upper >> (group % 8 // 2 * 2)) & 3
            ) << 4
            put(out, start + 16 * group, signed_floats(number - 32) * part)
        at += 210
