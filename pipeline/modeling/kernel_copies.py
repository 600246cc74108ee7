"""The memory that torch's kernels take while they run, beside their inputs and results: no mode sees it.

Measured on a CPU, by the largest resident memory of a process during each operation.
"""

from typing import Any

import torch

from layerstream.pipeline.planning.overheads import KERNEL_BYTES
from layerstream.stages.memory import round_up

__all__ = ["kernel_code_bytes", "kernel_copies"]

_aten = torch.ops.aten

# Of an input whose elements are not in order, they make a copy that is.
_ORDERING = {
    _aten._softmax.default,  # noqa: SLF001 - names of torch.s operations
    _aten._log_softmax.default,  # noqa: SLF001
    _aten.native_layer_norm.default,
    _aten.index_select.default,
}
_FLOAT32_BYTES = 4
_HALF_BYTES = 2
# In the order that convolutions compute in, channels are in blocks of so many.
_CHANNELS = 16
# oneDNN compiles some convolutions of 16 bits with an instruction for each position: 64 to 95 bytes were measured for
# sounds of 64,000 to 900,000 samples, and up to 64 MB of code in all.
_CODE_BYTES_PER_POSITION = 100


def kernel_copies(func: Any, args: Any, result: Any) -> list[int]:
    """The bytes of each block that ``func`` takes while it makes ``result`` from ``args``."""
    if func is _aten.convolution.default:
        return _convolution_copies(args, result)
    if func in _ORDERING and not args[0].is_contiguous():
        return [_nbytes(args[0])]
    if func is _aten.mean.dim and args[0].is_floating_point():
        # Sums are in float32, and so are all elements before.
        return [_FLOAT32_BYTES * args[0].numel()] if args[0].itemsize < _FLOAT32_BYTES else []
    return []


def kernel_code_bytes(func: Any, args: Any, result: Any) -> int:
    """The bytes of code that is compiled for ``func`` and these shapes, and kept, beyond the ``KERNEL_BYTES`` of any."""
    if func is not _aten.convolution.default or result.itemsize != _HALF_BYTES:
        return 0
    positions = int(max(args[0].shape[-1], result.shape[-1]))
    return max(0, _CODE_BYTES_PER_POSITION * positions - KERNEL_BYTES)


def _convolution_copies(args: Any, result: Any) -> list[int]:
    """What it reads and makes in the order that its kernel computes in; then what that has made once more, in 16 bits or transposed."""
    inputs, weight, transposed = args[0], args[1], args[6]
    nbytes, channels = _nbytes(result), result.shape[1]
    first = [_nbytes(inputs), _nbytes(weight), nbytes * round_up(channels, _CHANNELS) // channels]
    second = [nbytes, nbytes] if result.itemsize == _HALF_BYTES or transposed else []
    return max(first, second, key=sum)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize
