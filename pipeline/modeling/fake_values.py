"""Made-up values for forward passes on the meta device, where no value is known."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeValues"]

_aten = torch.ops.aten

# A loop that waits for a value to change would wait for ever.
_MOST_ANSWERS = 10_000


class FakeValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes up the values that a model asks for, so that the pass goes on.

    Args:
        padded: Whether sequences of the batch are of different lengths: then not all of a mask holds.
    """

    def __init__(self, *, padded: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = _MOST_ANSWERS
        self._padded = padded
        self._whether_all: weakref.ref[torch.Tensor] | None = None

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what takes values."""
        if func in {_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default}:  # noqa: SLF001
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("the model keeps asking for values")
            tensor = args[0]
            if func is _aten.nonzero.default:  # all are taken for true
                shape = (tensor.numel(), tensor.dim())
                return torch.empty(shape, dtype=torch.long, device="meta")
            if func is _aten.equal.default or tensor.dtype is torch.bool:
                return self._whether_all is None or tensor is not self._whether_all()
            return 1.0 if tensor.is_floating_point() else 1
        if func is _aten._grouped_mm.default and args[0].is_meta:  # noqa: SLF001
            return _grouped(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        # transformers also compares the sum of a mask with the number of its elements.
        if self._padded and (
            func is _aten.all.default or (func is _aten.eq.Scalar and not args[0].dim())
        ):
            self._whether_all = weakref.ref(result)
        return result


def _grouped(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """What experts make of their tokens. torch's own answer on the meta device is for bfloat16 alone, its kernels are not."""
    brief = [
        each.bfloat16() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in args
    ]
    result: torch.Tensor = func(*brief, **kwargs)
    return result if kwargs.get("out_dtype") else result.to(args[0].dtype)
