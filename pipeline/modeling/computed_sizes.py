"""Finds whether a pass computes numbers of its own, such as the length of the sound that it makes: its memory depends on them."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layerstream.pipeline.modeling.live_bytes import tensors_in

__all__ = ["ComputedSizes"]

_aten = torch.ops.aten


class ComputedSizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows integers that a pass makes from its floating-point numbers, and sees whether it asks for one of them.

    Attributes:
        found: It did: a size, most likely.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computed: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.found = False

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Follow the result of ``func``."""
        if func is _aten._local_scalar_dense.default and self._is_computed(args[0]):  # noqa: SLF001 - torch's name
            self.found = True
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and _is_integer(result):
            rounds = func is _aten._to_copy.default and args[0].is_floating_point()  # noqa: SLF001 - torch's name
            if rounds or any(map(self._is_computed, tensors_in(args))):
                storage = result.untyped_storage()
                self._computed[id(storage)] = weakref.ref(storage, self._forget(id(storage)))
        return result

    def _is_computed(self, tensor: torch.Tensor) -> bool:
        return id(tensor.untyped_storage()) in self._computed

    def _forget(self, key: int) -> Any:
        return lambda _: self._computed.pop(key, None)


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
