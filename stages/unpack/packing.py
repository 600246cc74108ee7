"""What a packed weight is to those who need its numbers."""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch

__all__ = ["LIKE", "Packing", "byte_array", "check_rows", "check_window", "storage_array"]


class Packing(Protocol):
    """How a matrix is packed. Implementations are frozen and hashable, and may be used by several threads at once.

    They compute in as many threads as torch's operations do.
    """

    @property
    def encoding(self) -> str:
        """The name under which rates are measured and reported, such as ``Q4_K`` or ``fp8``."""

    def unpack(self, parts: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> None:
        """Write rows ``first`` .. ``first + len(out)`` of the unpacked matrix into ``out``.

        Args:
            parts: The packed tensors as they are stored: contiguous, on the CPU, at any alignment, never written to.
            first: The first row. Leading dimensions of the parts count as rows.
            out: A contiguous matrix (rows, columns) on the CPU: float32, bfloat16 or float16. Every number is written.

        Raises:
            ValueError: The parts or ``out`` do not fit one another.
        """

    def multiply(
        self, parts: Sequence[torch.Tensor], first: int, inputs: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Multiply a few inputs with rows ``first`` .. ``first + out.shape[1]`` of the matrix, summing in float32.

        Faster than unpacking for a few tokens, and in another order than any matrix product of torch. With w the numbers that
        ``unpack`` writes to a float32 output, the output is ``sum(w * x)`` in floating point. Each of 64 partial sums takes
        every 64th product, so that a product is rounded once, goes through at most columns / 64 + 1 additions, and through six
        more when the partial sums are added. Every rounding has a relative error of at most u = 2^-24, so that, without
        underflow and overflow, ``|error| <= g * sum(|w| * |x|)`` with g = k u / (1 - k u) and k = columns / 64 + 8.

        A scale of n * 64 columns is applied to their sums instead, of which there are m in a row: a product goes through n
        roundings in its partial sum, two when four of these are added, one each when the scale is applied and the sum added to
        those of the m - 1 next scales, and four when 16 lanes are added. With that of w itself, which is left out, these are
        n + m + 7, and no more than k, since columns = 64 n m.

        Where ``unpack`` rounds w to bfloat16 or float16 on the way to float32, kernels leave that out: with a precision of
        p bits (8, 11), the error may be greater by ``v * sum(|w| * |x|)`` with v = 2^-p / (1 - 2^-p). Where scales are of other
        numbers of columns than 32 or multiples of 64, and where torch multiplies for want of numba, k = columns.

        Args:
            parts: As for ``unpack``.
            first: The first row.
            inputs: A contiguous float32 matrix (tokens, columns).
            out: A contiguous float32 matrix (tokens, rows). Every number is written.

        Raises:
            ValueError: The arguments do not fit one another.
        """


# Kernels take the format of numbers from the type of an array. numba has no bfloat16 and no half: ``kernels/vectors.py``.
_STORAGE = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
LIKE: Final[dict[torch.dtype, Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}
"""Empty arrays that tell a kernel what to round intermediate results to."""


def byte_array(tensor: torch.Tensor) -> Any:
    """Return the bytes of a contiguous tensor as a flat array, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def storage_array(out: torch.Tensor) -> Any:
    """Return a contiguous output as a flat array of the type that kernels know."""
    return out.view(_STORAGE[out.dtype]).reshape(-1).numpy()


def check_rows(encoding: str, *, rows: int, first: int, count: int) -> None:
    """Refuse rows that a matrix of ``rows`` rows does not have."""
    if first < 0 or first + count > rows:
        raise ValueError(
            f"{encoding} has {rows} rows here: there are no rows {first} to {first + count}."
        )


def check_window(encoding: str, *, rows: int, columns: int, first: int, out: torch.Tensor) -> None:
    """Refuse an output that is no window of ``rows`` rows of ``columns`` numbers: kernels check nothing."""
    if out.dtype not in _STORAGE or out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError(
            f"{encoding} is unpacked to contiguous float32, bfloat16 or float16 on the CPU, "
            f"not to {out.dtype} on {out.device}{'' if out.is_contiguous() else ', not contiguous'}."
        )
    if out.shape[1:] != (columns,):
        raise ValueError(
            f"{encoding} has rows of {columns} numbers here, but the output is {tuple(out.shape)}."
        )
    check_rows(encoding, rows=rows, first=first, count=len(out))
