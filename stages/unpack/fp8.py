"""Weights of 8 bits (fp8), or packed fp4, with float scales or exponents for blocks, rows or the whole matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from layerstream.stages.unpack.packing import LIKE, check_window
from layerstream.stages.unpack.scaled_rows import NUMBERS, Geometry, ScaledRows, scales_of

__all__ = ["Fp8Packing"]

_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "e2m1"}
_FORMATS |= {torch.float4_e2m1fn_x2: "e2m1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Packing:
    """Two parts: weights (..., rows, columns), and scales (..., scale rows, scale columns), or a single scale.

    Weights are ``float8_e4m3fn``, ``float8_e5m2``, the bits of one of them as ``uint8`` (see ``bits``), or two e2m1 numbers
    in each ``int8`` or ``float4_e2m1fn_x2``, the first in the lower four bits. Scales are float32, bfloat16, float16, or
    exponents: ``float8_e8m0fnu``, or ``uint8`` (2^(byte - 127), where 255 is infinite).
    """

    arithmetic: Literal["float32", "scale"] = "float32"
    """Which dtype products are rounded to, before they are cast to the output's.

    ``float32`` is transformers' ``Fp8Dequantize._dequantize_one`` for an output of the parameter's dtype, and its way with
    compressed-tensors' fp8 experts. ``scale``, the dtype of the scales, is what compressed-tensors' ``decompress`` computes in
    for ``float-quantized`` and ``naive-quantized``.
    """
    block: tuple[int, int] | None = None
    """Rows and columns of a block; None: as many as the shapes tell. Only blocks that are named may be cut off at the edges."""
    bits: Literal["e4m3", "e5m2"] | None = None
    """What weights of ``uint8`` are."""
    packs_fp4: bool = False
    """Whether weights are packed fp4: the encoding has its own name."""

    @property
    def encoding(self) -> str:
        """The name under which rates are measured."""
        return "fp4" if self.packs_fp4 else "fp8"

    def unpack(self, parts: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> None:
        """Write rows of the unpacked matrix into ``out``: see ``Packing``."""
        weights, scales = parts
        name = self.bits if weights.dtype == torch.uint8 else _FORMATS.get(weights.dtype)
        if name is None or (name == "e2m1") != self.packs_fp4:
            raise ValueError(f"Weights of {weights.dtype} cannot be unpacked as {self}.")
        numbers = NUMBERS[name]
        columns = weights.shape[-1] * 8 // numbers.bits
        rows = weights.numel() // weights.shape[-1]
        check_window(self.encoding, rows=rows, columns=columns, first=first, out=out)
        if self.arithmetic == "scale" and scales.dtype not in LIKE:
            raise ValueError(f"Nothing is computed in the dtype of the scales, {scales.dtype}.")
        ScaledRows(
            weights,
            scales,
            None,
            numbers,
            scales_of(scales),
            torch.float32 if self.arithmetic == "float32" else scales.dtype,
            self._geometry(weights, scales, columns),
        ).unpack(first, out)

    def _geometry(self, weights: torch.Tensor, scales: torch.Tensor, columns: int) -> Geometry:
        matrix_rows = weights.shape[-2] if weights.ndim > 1 else 1
        matrices = math.prod(weights.shape[:-2])
        # transformers takes scales without two dimensions as one for each matrix.
        bands, groups = scales.shape[-2:] if scales.ndim > 1 else (1, 1)
        if self.block is None and not matrix_rows % bands and not columns % groups:
            height, width = matrix_rows // bands, columns // groups
        elif self.block is not None:
            height, width = self.block
        else:
            height = width = 0
        fits = height > 0 and (-(-matrix_rows // height), -(-columns // width)) == (bands, groups)
        # Where blocks are cut off, every matrix begins with a new row of scales: only a single one can have them.
        fits = fits and (matrices == 1 or not matrix_rows % height)
        all_bands = scales.numel() // groups if groups else 0
        if not fits or all_bands not in {bands, bands * matrices}:
            raise ValueError(
                f"Scales {tuple(scales.shape)} do not fit weights of {matrix_rows} x {columns} in {tuple(weights.shape)}"
                + (f" in blocks of {self.block[0]} x {self.block[1]}." if self.block else ".")
            )
        return Geometry(
            columns=columns,
            row_bytes=weights.shape[-1],
            height=height,
            width=width,
            bands=all_bands,
            groups=groups,
            zero_bits=0,
            matrix_rows=matrix_rows,
        )
