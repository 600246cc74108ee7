"""Weights in MXFP4: e2m1 numbers in blocks of 32, with a power of two for each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerstream.stages.unpack.packing import check_window
from layerstream.stages.unpack.scaled_rows import NUMBERS, SCALES, Geometry, ScaledRows

__all__ = ["Mxfp4Packing"]

_BLOCK_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Packing:
    """Two parts: blocks ``uint8`` (..., rows, groups, 16), and the exponents ``uint8`` (..., rows, groups).

    As transformers' ``convert_moe_packed_tensors``, before it transposes. All products are exact in float32, so that they are
    rounded once, to the output's dtype.
    """

    @property
    def encoding(self) -> str:
        """The name under which rates are measured."""
        return "mxfp4"

    def unpack(self, parts: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> None:
        """Write rows of the unpacked matrix into ``out``: see ``Packing``."""
        blocks, exponents = parts
        shapes = f"blocks {tuple(blocks.shape)} and scales {tuple(exponents.shape)}"
        if blocks.shape[:-1] != exponents.shape or blocks.shape[-1] != _BLOCK_BYTES:
            raise ValueError(f"MXFP4 has a scale for each block of 16 bytes, not {shapes}.")
        if blocks.dtype != torch.uint8 or exponents.dtype != torch.uint8:
            raise ValueError(f"MXFP4 is uint8, not {blocks.dtype} with scales {exponents.dtype}.")
        groups = exponents.shape[-1]
        rows, columns = exponents.numel() // groups, 2 * _BLOCK_BYTES * groups
        check_window("MXFP4", rows=rows, columns=columns, first=first, out=out)
        ScaledRows(
            blocks,
            exponents,
            None,
            NUMBERS["2 * e2m1"],
            SCALES["half of uint8"],
            torch.float32,
            Geometry(
                columns=columns,
                row_bytes=_BLOCK_BYTES * groups,
                height=1,
                width=2 * _BLOCK_BYTES,
                bands=rows,
                groups=groups,
                zero_bits=0,
                matrix_rows=rows,
            ),
        ).unpack(first, out)
