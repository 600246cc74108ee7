"""numpy arrays without data, whose functions are recorded as the torch operations with equal results."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from layerstream.pipeline.modeling.tracer_tensor import record_call
from layerstream.stages.errors import ModelError

__all__ = ["TracedArray"]


class TracedArray:
    """Stands for an array of numpy's in code that moves numbers about, as transformers' GGUF processors do.

    What is known here are the functions that they use. Any other is refused by name instead of being guessed at.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        """What records."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy's."""
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        """As numpy's."""
        return self.tensor.ndim

    @property
    def T(self) -> "TracedArray":  # noqa: N802 - numpy's name
        """As numpy's."""
        return TracedArray(self.tensor.permute(*reversed(range(self.ndim))))

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> "TracedArray":
        return TracedArray(self.tensor[index])

    def reshape(self, *shape: Any) -> "TracedArray":
        """As numpy's: a view where that is possible, else a copy in order of rows."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        return TracedArray(self.tensor.reshape(tuple(sizes)))

    def swapaxes(self, first: int, second: int) -> "TracedArray":
        """As numpy's."""
        return TracedArray(self.tensor.transpose(first, second))

    def transpose(self, *axes: Any) -> "TracedArray":
        """As numpy's."""
        order = axes[0] if len(axes) == 1 and isinstance(axes[0], Sequence) else axes
        return TracedArray(self.tensor.permute(*order)) if order else self.T

    def flatten(self) -> "TracedArray":
        """As numpy's, which always copies; whether it does cannot be seen in the values."""
        return TracedArray(self.tensor.reshape(-1))

    def __neg__(self) -> "TracedArray":
        return TracedArray(-self.tensor)

    def __sub__(self, number: float) -> "TracedArray":
        return TracedArray(self.tensor - number)

    def __add__(self, number: float) -> "TracedArray":
        return TracedArray(self.tensor + number)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise ModelError(
            "Loading this model takes the values of its weights, which cannot be followed; load it with "
            "transformers' from_pretrained instead."
        )

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Record a function of single numbers. numpy's own runs in the replay where torch's last bits differ."""
        if function is not np.log or method != "__call__" or kwargs:
            _refuse(function)
        tensor = inputs[0].tensor
        return TracedArray(record_call(_log, [tensor], shape=tensor.shape, dtype=tensor.dtype))

    def __array_function__(
        self, function: Callable[..., Any], _types: Any, args: Any, kwargs: Any
    ) -> Any:
        """Record a function of numpy that moves numbers about."""
        known = _FUNCTIONS.get(function)
        return known(*args, **kwargs) if known else _refuse(function)


def _log(tensor: torch.Tensor) -> torch.Tensor:
    """Return numpy's logarithm, on any device."""
    return torch.from_numpy(np.log(tensor.cpu().numpy())).to(tensor.device)


def _array_split(array: TracedArray, sections: int, axis: int = 0) -> list[TracedArray]:
    return [TracedArray(part) for part in array.tensor.tensor_split(sections, dim=axis)]


def _stack(arrays: Sequence[TracedArray], axis: int = 0) -> TracedArray:
    return TracedArray(torch.stack([array.tensor for array in arrays], dim=axis))


def _concatenate(arrays: Sequence[TracedArray], axis: int = 0) -> TracedArray:
    return TracedArray(torch.cat([array.tensor for array in arrays], dim=axis))


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    np.array_split: _array_split,
    np.concatenate: _concatenate,
    # A copy keeps the order of its original in memory, and has the same values.
    np.copy: lambda array: array,
    np.expand_dims: lambda array, axis: TracedArray(array.tensor.unsqueeze(axis)),
    np.reshape: lambda array, shape: array.reshape(shape),
    np.split: _array_split,
    np.squeeze: lambda array, axis: TracedArray(array.tensor.squeeze(axis)),
    np.stack: _stack,
    np.swapaxes: TracedArray.swapaxes,
    np.transpose: TracedArray.transpose,
}


def _refuse(function: Any) -> Any:
    raise ModelError(
        f"Loading this model uses numpy.{getattr(function, '__name__', function)}, which cannot be followed; load it "
        "with transformers' from_pretrained instead."
    )
