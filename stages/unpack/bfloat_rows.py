"""Matrices of bfloat16 times a few rows, with the bits of torch's products, by compiled kernels: at the speed of memory.

oneDNN, which multiplies for torch, puts a matrix into another order before it computes, which for a row or two takes longer
than what follows. The kernel here reads it where it is, and sums in the order that was found to be oneDNN's.
"""

import functools
import platform
from collections.abc import Sequence
from typing import Any

import torch

from layerstream.stages.unpack.compiling import Kernel, compiled

__all__ = ["BfloatMatrices", "summed_columns"]

# Of one matrix; for more rows, torch is as fast.
_MOST_ROWS = 4
# What the kernel computes at once, and loads at once.
_ROW_BLOCK, _COLUMN_BLOCK = 16, 32
# What oneDNN makes a sum of before it adds that to others: 1024 columns if there are more, and several rows.
_SUMMED = (512, 1024)
# Products of smaller matrices are not worth loading a compiler for.
_LEAST_NUMBERS = 1 << 16
# A larger matrix is tried with fewer rows: each is summed by itself.
_TRIED_NUMBERS = 1 << 22


class BfloatMatrices:
    """Matrices of one shape in one memory.

    Args:
        matrices: bfloat16 ``[count, rows, columns]``, each contiguous.
        summed: What ``summed_columns`` says of their shape, and not empty.
    """

    def __init__(self, matrices: torch.Tensor, summed: Sequence[int]) -> None:
        kernel = _kernel()
        assert kernel is not None  # noqa: S101
        self._kernel = kernel
        self._summed = summed
        self._threads = torch.get_num_threads()
        _, self._rows, self._columns = matrices.shape
        self._stride, self._start = matrices.stride(0), matrices.storage_offset()
        storage = matrices.untyped_storage()
        numbers = storage.nbytes() // matrices.itemsize
        # Outside inference mode, like the memory: numpy's array is a view of it.
        with torch.inference_mode(mode=False):
            flat = torch.empty(0, dtype=torch.uint16).set_(storage, 0, (numbers,), (1,))
        self._memory: Any = flat.numpy()

    def fit(self, counts: Sequence[int]) -> bool:
        """Whether so many rows may be multiplied with a matrix each; not with other threads than ``summed`` was found for."""
        return max(counts) <= len(self._summed) and torch.get_num_threads() == self._threads

    def products(
        self, places: Sequence[int], counts: Sequence[int], inputs: torch.Tensor
    ) -> torch.Tensor:
        """The products of ``inputs`` with transposed matrices, bfloat16.

        Args:
            places: Of matrices.
            counts: How many rows, one after the other, are multiplied with each.
            inputs: bfloat16 ``[rows, columns]``.
        """
        import numpy as np

        out = torch.empty((len(inputs), self._rows), dtype=torch.bfloat16)
        self._kernel(
            len(inputs) * self._rows * self._columns,
            len(inputs) * (self._rows // _ROW_BLOCK),
            self._memory,
            self._stride,
            self._start,
            np.repeat(np.array(places, dtype=np.int64), counts),
            np.repeat(np.array([self._summed[n - 1] for n in counts], dtype=np.int64), counts),
            self._rows,
            self._columns,
            inputs.contiguous().view(torch.int32).view(-1).numpy(),
            out.view(torch.uint16).view(-1).numpy(),
        )
        return out


def summed_columns(rows: int, columns: int) -> tuple[int, ...]:
    """How many columns make a sum, for one row, two rows, and so on, so that products have the bits of torch's here.

    Empty if none do, and for small matrices.
    """
    if rows * columns < _LEAST_NUMBERS or rows % _ROW_BLOCK or columns % _COLUMN_BLOCK:
        return ()
    return _summed_columns(rows, columns, torch.get_num_threads())


@functools.cache
def _summed_columns(rows: int, columns: int, _threads: int) -> tuple[int, ...]:
    if _kernel() is None:
        return ()
    rows = min(rows, max(_ROW_BLOCK, _TRIED_NUMBERS // columns // _ROW_BLOCK * _ROW_BLOCK))
    # Terms cancel one another: what rounding leaves over differs in nearly every element if the order does.
    generator = torch.Generator().manual_seed(0)
    half = columns // 2
    order = torch.randperm(half, generator=generator)
    made = torch.randn((rows, half), generator=generator)
    given = torch.randn((_MOST_ROWS, half), generator=generator)
    matrix = torch.cat([made, -made[:, order]], dim=1).bfloat16()
    inputs = torch.cat([given, given[:, order]], dim=1).bfloat16()
    tried = [
        (
            width,
            BfloatMatrices(matrix[None], [width]).products(
                [0] * _MOST_ROWS, [1] * _MOST_ROWS, inputs
            ),
        )
        for width in _SUMMED
    ]
    found = []
    for count in range(1, _MOST_ROWS + 1):
        expected = torch.mm(inputs[:count], matrix.t())
        equal = [width for width, products in tried if torch.equal(products[:count], expected)]
        if not equal:
            break
        found.append(equal[0])
    return tuple(found)


@functools.cache
def _kernel() -> Kernel | None:
    """None where it cannot be compiled, or the processor lacks the instruction."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return None
    try:
        import llvmlite.binding
    except ImportError:  # ``compiled`` says so where it matters
        return None
    if not llvmlite.binding.get_host_cpu_features().get("avx512bf16"):
        return None
    return compiled("bfloat_rows", "bfloat_rows")
