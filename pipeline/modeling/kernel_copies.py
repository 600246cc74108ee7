"""The memory that torch's kernels take while they run, beside their inputs and results: no mode sees it.

Measured on a CPU, by the largest resident memory of a process during each operation.
"""

from typing import Any

import torch

__all__ = ["kernel_copies"]

_aten = torch.ops.aten

# Of an input whose elements are not in order, they make a copy that is.
_ORDERING = {
    _aten._softmax.default,  # noqa: SLF001 - names of torch.s operations
    _aten._log_softmax.default,  # noqa: SLF001
    _aten.native_layer_norm.default,
    _aten.index_select.default,
}
_FLOAT32_BYTES = 4


def kernel_copies(func: Any, args: Any, result: Any) -> list[int]:
    """The bytes of each block that ``func`` takes while it makes ``result`` from ``args``."""
    if func is _aten.convolution.default:
        # In the order that its kernel computes in, if it is another.
        return [_nbytes(tensor) for tensor in (args[0], args[1], result)]
    if func in _ORDERING and not args[0].is_contiguous():
        return [_nbytes(args[0])]
    if func is _aten.mean.dim and args[0].is_floating_point():
        # Sums are in float32, and so are all elements before.
        return [_FLOAT32_BYTES * args[0].numel()] if args[0].itemsize < _FLOAT32_BYTES else []
    return []


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize
