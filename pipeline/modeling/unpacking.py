"""Unpacking as an operation of its own, recorded where transformers would unpack a weight while it loads.

transformers unpacks with a dozen tensor operations, each of which takes memory for the whole tensor. A ``Tracer`` of packed
bytes records a single one instead, ``Unpack``, whose results have the same bits. A replay runs it on the whole tensor; where
rows are enough, they are unpacked alone (see packed_rows.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from layerstream.pipeline.modeling.tracer_tensor import Tracer, record_call
from layerstream.stages.unpack.packing import Packing

__all__ = ["Unpack", "unpacked"]

# Per value: integers of several widths, and float32 before and after scaling. Measured on a CPU for all block types of GGUF
# (most: IQ3_S), fp8 (8) and MXFP4.
_TEMPORARY_BYTES = 15


@dataclass(frozen=True, slots=True, eq=False)
class Unpack:
    """Turns the packed parts of a weight into the plain one."""

    packing: Packing
    shape: tuple[int, ...]
    """Of the plain weight; its last dimension is the columns of the packing."""
    dtype: torch.dtype
    on_device: Callable[..., torch.Tensor] = field(repr=False)
    """transformers' own function of the parts, for devices other than the CPU."""
    rounds: bool = False
    """The packing rounds to ``dtype`` by itself, so that it may write other dtypes."""

    @property
    def temporary_bytes(self) -> int:
        """What transformers' function takes besides its result, at most."""
        return _TEMPORARY_BYTES * torch.Size(self.shape).numel()

    def __call__(self, *parts: torch.Tensor) -> torch.Tensor:
        """The whole weight, in memory of its own."""
        if parts[0].device.type != "cpu":
            return self.on_device(*parts)
        plain = torch.empty(self.shape, dtype=self.dtype)
        self.packing.unpack(parts, 0, plain.view(-1, self.shape[-1]))
        return plain


def unpacked(
    parts: Sequence[torch.Tensor],
    packing: Packing,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    on_device: Callable[..., torch.Tensor],
    rounds: bool = False,
) -> torch.Tensor:
    """What ``parts`` unpack to: recorded if they are ``Tracer``s, else computed.

    Args:
        parts: The packed tensors, as ``packing`` takes them.
        packing: How they are packed.
        shape: Of the result.
        dtype: Of the result.
        on_device: transformers' own function of the parts, which gives the same result.
        rounds: Whether ``packing`` rounds to ``dtype`` whatever it writes; else it rounds to what it writes.
    """
    function = Unpack(packing, tuple(shape), dtype, on_device, rounds)
    if all(isinstance(part, Tracer) for part in parts):
        return record_call(function, parts, shape=function.shape, dtype=dtype)
    return function(*parts)
