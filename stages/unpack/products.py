"""Multiplying packed weights with the inputs of a few tokens, without unpacking them into memory."""

from collections.abc import Callable
from typing import Any

import torch

from layerstream.stages.unpack.compiling import Kernel

__all__ = ["check_product", "multiply_plainly", "multiply_tokens"]

# A kernel unpacks a row once for so many tokens.
_TOKENS = 4
# Numbers that are unpacked at a time where there are no kernels: they stay in the processor's caches.
_PLAIN_NUMBERS = 1 << 18


def check_product(encoding: str, *, columns: int, inputs: torch.Tensor, out: torch.Tensor) -> None:
    """Refuse inputs and outputs that do not belong together: kernels check nothing."""
    for name, tensor in (("inputs", inputs), ("outputs", out)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.ndim != 2:
            raise ValueError(
                f"{encoding} is multiplied with contiguous matrices of float32: "
                f"the {name} are {tensor.dtype} {tuple(tensor.shape)}."
            )
    if inputs.shape[1] != columns or len(inputs) != len(out):
        raise ValueError(
            f"{encoding} has {columns} columns here, which do not fit inputs {tuple(inputs.shape)} "
            f"and outputs {tuple(out.shape)}."
        )


def multiply_tokens(
    kernel: Kernel, arguments: tuple[Any, ...], inputs: torch.Tensor, out: torch.Tensor
) -> None:
    """Run a kernel for all tokens, some at a time; ``arguments`` come before inputs, a tuple of tokens, and outputs."""
    rows = out.shape[1]
    numbers = rows * inputs.shape[1]
    first = 0
    while first < len(inputs):
        # Kernels are compiled for one, two and four tokens.
        count = next(number for number in (_TOKENS, 2, 1) if first + number <= len(inputs))
        chosen = slice(first, first + count)
        flat = inputs[chosen].reshape(-1).numpy(), out[chosen].reshape(-1).numpy()
        kernel(numbers, rows, *arguments, flat[0], (0,) * count, flat[1])
        first += count


def multiply_plainly(
    unpack: Callable[[int, torch.Tensor], None],
    first: int,
    inputs: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Multiply with a few rows at a time, which ``unpack`` writes in float32."""
    columns = inputs.shape[1]
    tile = torch.empty(max(1, _PLAIN_NUMBERS // columns), columns)
    for start in range(0, out.shape[1], len(tile)):
        rows = tile[: out.shape[1] - start]
        unpack(first + start, rows)
        out[:, start : start + len(rows)] = inputs @ rows.T
