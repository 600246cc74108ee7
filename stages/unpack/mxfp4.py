"""Weights in MXFP4: e2m1 numbers in blocks of 32, with a power of two for each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerstream.stages.unpack.scaled_rows import (
    NUMBERS,
    SCALES,
    Geometry,
    ScaledPacking,
    ScaledRows,
)

__all__ = ["Mxfp4Packing"]

_BLOCK_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Packing(ScaledPacking):
    """Two parts: blocks ``uint8`` (..., rows, groups, 16), and the exponents ``uint8`` (..., rows, groups).

    As transformers' ``convert_moe_packed_tensors``, before it transposes. All products are exact in float32, so that they are
    rounded once, to the output's dtype.
    """

    @property
    def encoding(self) -> str:
        """The name under which rates are measured."""
        return "mxfp4"

    def matrix(self, parts: Sequence[torch.Tensor]) -> ScaledRows:
        """Return the parts as a matrix with scales, after checking that they fit one another."""
        blocks, exponents = parts
        if blocks.shape[:-1] != exponents.shape or blocks.shape[-1] != _BLOCK_BYTES:
            raise ValueError(
                f"MXFP4 has a scale for each block of 16 bytes, not blocks {tuple(blocks.shape)} "
                f"and scales {tuple(exponents.shape)}."
            )
        if blocks.dtype != torch.uint8 or exponents.dtype != torch.uint8:
            raise ValueError(f"MXFP4 is uint8, not {blocks.dtype} with scales {exponents.dtype}.")
        groups = exponents.shape[-1]
        rows = exponents.numel() // groups
        return ScaledRows(
            encoding=self.encoding,
            packed=blocks,
            scales=exponents,
            scale=SCALES["half of uint8"],
            numbers=NUMBERS["2 * e2m1"],
            rounding=torch.float32,
            geometry=Geometry(
                columns=2 * _BLOCK_BYTES * groups,
                row_bytes=_BLOCK_BYTES * groups,
                height=1,
                width=2 * _BLOCK_BYTES,
                bands=rows,
                groups=groups,
                zero_bits=0,
                matrix_rows=rows,
            ),
        )
