"""GGUF's blocks in torch: each function takes (n, bytes of a block), and computes in ``dtype``, step by step.

The layout of the blocks is described in ``kernels/gguf_blocks.py`` and ``kernels/gguf_k_blocks.py``.
"""

from collections.abc import Callable
from typing import Final

import torch

__all__ = ["BLOCK_VALUES", "halved_exponents"]

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_DOUBLED_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _half(blocks: torch.Tensor, at: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    # Cloned, since a file gives the bytes no alignment.
    return blocks[:, at : at + 2].clone().view(torch.float16).to(dtype)


def halved_exponents(data: torch.Tensor) -> torch.Tensor:
    """Return 2^(byte - 128) in float32, for every byte a finite number."""
    exponents = data.to(torch.int32)
    # The smallest two are subnormal.
    bits = torch.where(exponents < 2, (1 << 21) << exponents.clamp(max=1), (exponents - 1) << 23)
    return bits.view(torch.float32)


def _fields(data: torch.Tensor, bits: int, count: int, width: int) -> torch.Tensor:
    """Return the ``count`` fields of ``bits`` of each byte: those of ``width`` bytes one after another, lowest field first."""
    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8).reshape(1, 1, -1, 1)
    parts = data.reshape(len(data), -1, 1, width) >> shifts
    return (parts & ((1 << bits) - 1)).reshape(len(data), -1)


def _fifths(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return bit n of four bytes as the fifth bit of number n."""
    bits = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8)
    return ((bits & 1) << 4).reshape(len(blocks), 32)


def _levels(table: tuple[int, ...], quants: torch.Tensor) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.int8)[quants.int()]


def _q8_0(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _half(blocks, 0, dtype) * blocks[:, 2:].view(torch.int8)


def _q4_0(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _half(blocks, 0, dtype) * (_fields(blocks[:, 2:], 4, 2, 16).to(torch.int8) - 8)


def _q4_1(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scaled = _half(blocks, 0, dtype) * _fields(blocks[:, 4:], 4, 2, 16)
    return scaled + _half(blocks, 2, dtype)


def _q5_0(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    quants = _fields(blocks[:, 6:], 4, 2, 16) | _fifths(blocks, 2)
    return _half(blocks, 0, dtype) * (quants.to(torch.int8) - 16)


def _q5_1(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    quants = _fields(blocks[:, 8:], 4, 2, 16) | _fifths(blocks, 4)
    return _half(blocks, 0, dtype) * quants + _half(blocks, 2, dtype)


def _iq4_nl(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _half(blocks, 0, dtype) * _levels(_IQ4_LEVELS, _fields(blocks[:, 2:], 4, 2, 16))


def _mxfp4(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = halved_exponents(blocks[:, :1]).to(dtype)
    return scale * _levels(_DOUBLED_FP4, _fields(blocks[:, 1:], 4, 2, 16))


def _grouped(scale: torch.Tensor, quants: torch.Tensor) -> torch.Tensor:
    """Multiply groups of numbers, each by its scale."""
    return (scale[..., None] * quants.reshape(*scale.shape, -1)).reshape(len(scale), -1)


def _shifted(scale: torch.Tensor, quants: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    scaled = scale[..., None] * quants.reshape(*scale.shape, -1)
    return (scaled - minimum[..., None]).reshape(len(scale), -1)


def _q2_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = _half(blocks, 80, dtype) * (blocks[:, :16] & 15)
    minimum = _half(blocks, 82, dtype) * (blocks[:, :16] >> 4)
    return _shifted(scale, _fields(blocks[:, 16:80], 2, 4, 32), minimum)


def _q3_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    lower, upper = _fields(blocks[:, 96:104], 4, 2, 8), _fields(blocks[:, 104:108], 2, 4, 4)
    scale = _half(blocks, 108, dtype) * ((lower | upper << 4).to(torch.int8) - 32)
    thirds = _fields(blocks[:, :32], 1, 8, 32) << 2
    quants = (_fields(blocks[:, 32:96], 2, 4, 32) | thirds).to(torch.int8) - 4
    return _grouped(scale, quants)


def _scales_and_minima(
    blocks: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eight scales and minima of Q4_K and Q5_K, of six bits each, times those of the block."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], dim=1)
    minimum = torch.cat([second & 63, (rest >> 4) | (second >> 6) << 4], dim=1)
    return (_half(blocks, 0) * scale).to(dtype), (_half(blocks, 2) * minimum).to(dtype)


def _q4_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale, minimum = _scales_and_minima(blocks, dtype)
    return _shifted(scale, _fields(blocks[:, 16:], 4, 2, 32), minimum)


def _q5_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale, minimum = _scales_and_minima(blocks, dtype)
    fifths = _fields(blocks[:, 16:48], 1, 8, 32) << 4
    return _shifted(scale, _fields(blocks[:, 48:], 4, 2, 32) | fifths, minimum)


def _q6_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = (_half(blocks, 208) * blocks[:, 192:208].view(torch.int8)).to(dtype)
    upper = _fields(blocks[:, 128:192], 2, 4, 32) << 4
    quants = (_fields(blocks[:, :128], 4, 2, 64) | upper).to(torch.int8) - 32
    return _grouped(scale, quants)


def _iq4_xs(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    lower = _fields(blocks[:, 4:8], 4, 2, 1)
    upper = _fields(blocks[:, 2:4], 2, 4, 1)
    scale = _half(blocks, 0, dtype) * ((lower | upper << 4).to(torch.int8) - 32)
    return _grouped(scale, _levels(_IQ4_LEVELS, _fields(blocks[:, 8:], 4, 2, 16)))


BLOCK_VALUES: Final[dict[str, Callable[[torch.Tensor, torch.dtype], torch.Tensor]]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
"""For each encoding, the function that returns the numbers of some blocks, (n, numbers of a block)."""
