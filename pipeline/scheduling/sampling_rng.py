"""Sampling with a request's own generator: torch's default one is shared by all threads of the process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["sampling_from"]


def sampling_from(generator: torch.Generator | None) -> AbstractContextManager[object]:
    """Make sampling in the calling thread use ``generator``, on the device of what is sampled.

    A generator seeded with a number gives the same samples as the default one after ``torch.manual_seed`` with that
    number. None changes nothing.
    """
    return nullcontext() if generator is None else _SamplingMode(generator)


class _SamplingMode(TorchFunctionMode):
    """Passes ``generator`` to the two functions by which transformers samples."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.multinomial:
            named.setdefault("generator", self._generator)
        elif func is torch.rand_like and not named:
            like = args[0]
            func, args = torch.rand, (like.shape,)
            named = {"generator": self._generator, "dtype": like.dtype, "device": like.device}
        return func(*args, **named)
