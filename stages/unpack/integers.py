"""Weights of 8 or 4 bits that are integers, as compressed-tensors stores them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from layerstream.stages.unpack.packing import LIKE, check_window
from layerstream.stages.unpack.scaled_rows import NUMBERS, Geometry, ScaledRows, scales_of

__all__ = ["IntPacking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IntPacking:
    """Weights and scales, and zero points if the quantisation is asymmetric: two or three parts.

    ``pack-quantized`` weights are ``int32`` (..., rows, words), with 32 / bits numbers in a word, the first in the lowest bits,
    as unsigned offsets from the smallest number. ``int-quantized`` ones are ``int8`` (..., rows, columns). Scales (float32,
    bfloat16 or float16) are (..., rows, groups), (..., rows, 1), or a single one. Zero points are ``int8`` of the shape of the
    scales, or ``int32``, where the rows are packed as the columns of the weights are.

    The reference is ``decompress`` of compressed-tensors 0.20: number less zero point, which is exact, times scale, rounded to
    the dtype of the scales, and then cast to the output's.
    """

    bits: Literal[4, 8]
    columns: int
    """Numbers in a row: words at the end of a row may hold more."""

    def __post_init__(self) -> None:
        """Refuse what there is no kernel for."""
        if self.bits not in {4, 8}:
            raise ValueError(f"Integers of 4 and 8 bits can be unpacked, not of {self.bits}.")

    @property
    def encoding(self) -> str:
        """The name under which rates are measured."""
        return f"int{self.bits}"

    def unpack(self, parts: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> None:
        """Write rows of the unpacked matrix into ``out``: see ``Packing``."""
        weights, scales, *rest = parts
        if len(rest) > 1:
            raise ValueError(
                f"{self.encoding} has weights, scales and zero points, and no order of columns (weight_g_idx): {len(parts)} parts."
            )
        if weights.dtype == torch.int32:
            numbers, stored = (
                NUMBERS["int4 + 8" if self.bits == 4 else "int8 + 128"],
                32 // self.bits,
            )
        elif weights.dtype == torch.int8 and self.bits == 8:
            numbers, stored = NUMBERS["int8"], 1
        else:
            raise ValueError(
                f"{self.encoding} is stored as int32 words or int8, not {weights.dtype}."
            )
        if -(-self.columns // stored) != weights.shape[-1]:
            raise ValueError(
                f"Rows of {self.columns} numbers are not {weights.shape[-1]} elements of {weights.dtype}."
            )
        if scales.dtype not in LIKE:
            raise ValueError(f"{self.encoding} has float scales, not {scales.dtype}.")
        rows = weights.numel() // weights.shape[-1]
        check_window(self.encoding, rows=rows, columns=self.columns, first=first, out=out)
        zeros = rest[0] if rest else None
        ScaledRows(
            weights,
            scales,
            zeros,
            numbers,
            scales_of(scales),
            scales.dtype,
            self._geometry(weights, scales, zeros),
        ).unpack(first, out)

    def _geometry(
        self, weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> Geometry:
        *leading, matrix_rows, elements = weights.shape
        matrices = math.prod(leading)
        groups = scales.shape[-1] if scales.ndim > 1 else 1
        bands = scales.numel() // groups if groups else 0
        if not bands or self.columns % groups or matrix_rows * matrices % bands:
            raise ValueError(
                f"Scales {tuple(scales.shape)} do not fit {matrix_rows} rows of {self.columns} in {tuple(weights.shape)}."
            )
        zero_bits = 0
        if zeros is not None:
            words = -(-matrix_rows * self.bits // 32) * matrices
            if zeros.dtype == torch.int8 and zeros.numel() == scales.numel():
                zero_bits = -8
            elif zeros.dtype == torch.int32 and zeros.numel() == words * groups:
                zero_bits = self.bits
            else:
                raise ValueError(
                    f"Zero points {zeros.dtype} {tuple(zeros.shape)} do not fit scales {tuple(scales.shape)}."
                )
        return Geometry(
            columns=self.columns,
            row_bytes=elements * weights.element_size(),
            height=matrix_rows * matrices // bands,
            width=self.columns // groups,
            bands=bands,
            groups=groups,
            zero_bits=zero_bits,
            matrix_rows=matrix_rows,
        )
