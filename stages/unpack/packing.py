"""What a packed weight is to those who need its numbers."""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch

__all__ = ["LIKE", "Packing", "byte_array", "check_window", "storage_array"]


class Packing(Protocol):
    """How a matrix is packed. Implementations are frozen and hashable, and may be used by several threads at once."""

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
    if first < 0 or first + len(out) > rows:
        raise ValueError(
            f"{encoding} has {rows} rows here: there are no rows {first} to {first + len(out)}."
        )
