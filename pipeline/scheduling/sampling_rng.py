"""Sampling with a request's own generator: torch's default one is shared by all threads of the process."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

__all__ = ["SamplingGenerator"]


class SamplingGenerator:
    """Makes sampling in the calling thread use ``generator``, on the device of what is sampled; a context manager.

    A generator seeded with a number gives the same samples as the default one after ``torch.manual_seed`` with that
    number. None changes nothing.

    Sampling is found by a torch-function mode, through which every call of torch's goes: some milliseconds in a forward
    pass. transformers samples between passes, so it is paused during them.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._mode = None if generator is None else _SamplingMode(generator)
        self._paused = False

    def __enter__(self) -> Self:
        if self._mode is not None:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        mode, self._mode = self._mode, None
        if mode is not None and not self._paused:
            mode.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def pause(self) -> None:
        """A forward pass begins in this thread."""
        # Under another mode it stays: modes are left in the order opposite to that in which they were entered.
        if self._mode is not None and _get_current_function_mode() is self._mode:  # type: ignore[no-untyped-call]
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._paused = True

    def resume(self) -> None:
        """The forward pass has ended."""
        if self._paused and self._mode is not None:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        self._paused = False


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
