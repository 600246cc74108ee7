"""Building models in one thread without changing anything for the others.

transformers builds a model under another default dtype of torch, which is the whole process's: what other threads compute
meanwhile would have that dtype. Here the default is this thread's alone: a mode sees each call of a torch function, and asks
for the dtype that the call would have had.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.replacing import for_this_thread

__all__ = ["building_alone"]

# Their results have the default dtype, whatever their arguments are.
_MAKE_FLOATS = frozenset(
    {
        torch.bartlett_window,
        torch.blackman_window,
        torch.empty,
        torch.empty_permuted,
        torch.empty_strided,
        torch.eye,
        torch.fft.fftfreq,
        torch.fft.rfftfreq,
        torch.hamming_window,
        torch.hann_window,
        torch.kaiser_window,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.scalar_tensor,
        torch.zeros,
    }
)
# Their results have the default dtype if their arguments are Python's floating-point numbers.
_TAKE_NUMBERS = frozenset(
    {torch.arange, torch.as_tensor, torch.asarray, torch.full, torch.range, torch.tensor}
)
_DRAW = frozenset(
    {
        torch.bernoulli,
        torch.multinomial,
        torch.normal,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.Tensor.bernoulli_,
        torch.Tensor.exponential_,
        torch.Tensor.normal_,
        torch.Tensor.random_,
        torch.Tensor.uniform_,
    }
)
_SAY_THEIR_DTYPE = frozenset({torch.Tensor.float, torch.Tensor.type, torch.from_numpy})


class _DefaultDtype(TorchFunctionMode):
    """torch's default dtype, for this thread alone.

    Args:
        dtype: The default.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, which has the process's default dtype, as if it had this one."""
        kwargs = kwargs or {}
        if kwargs.get("dtype") is not None or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        if func in _MAKE_FLOATS:
            return func(*args, **{**kwargs, "dtype": self.dtype})
        result = func(*args, **kwargs)
        if (
            not isinstance(result, torch.Tensor)
            or result.dtype is not _process_default()
            or func in _SAY_THEIR_DTYPE
            or _says_a_dtype((args, kwargs))
        ):
            return result
        if func in _TAKE_NUMBERS:
            return func(*args, **{**kwargs, "dtype": self.dtype})
        return result.to(self.dtype)


# It is replaced while a model is built.
_process_default = torch.get_default_dtype


class _LinspaceOnCpu(TorchFunctionMode):
    """What transformers does to ``torch.linspace``, so that models may take its values: in this thread alone."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, on the CPU if it is that one."""
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


def _says_a_dtype(arguments: Any) -> bool:
    """Whether the dtype of a result follows from the arguments: from numbers of a dtype, or from one that is named."""
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, torch.dtype):
            return True
        dtype = getattr(leaf, "dtype", None)
        if isinstance(leaf, torch.Tensor):
            if leaf.is_floating_point():
                return True
        elif dtype is not None:  # numpy's
            return True
    return False


class _RandomNumbers(TorchFunctionMode):
    """Random numbers that the process's generator would give, without taking them from it: others may be sampling."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()
        self._generator.set_state(torch.get_rng_state())

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, with this generator if it draws numbers on the CPU."""
        kwargs = kwargs or {}
        # Functions of torch.nn.init, which may be replaced by transformers' own, say that they take one.
        if (func in _DRAW or "generator" in kwargs) and kwargs.get("generator") is None:
            first = args[0] if args else kwargs.get("tensor")
            device = first.device if isinstance(first, torch.Tensor) else kwargs.get("device")
            if device is None or torch.device(device).type == "cpu":
                kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)


@contextmanager
def building_alone() -> Iterator[None]:
    """Let what transformers changes for the whole process while it builds a model be changed for this thread alone."""
    from transformers import PreTrainedModel, initialization, modeling_utils

    dtypes: list[torch.dtype] = []
    untied: list[None] = []

    def local_torch_dtype(dtype: torch.dtype, *args: Any) -> Any:
        if dtype.is_floating_point:
            return _stacked(dtypes, dtype, _DefaultDtype(dtype))
        return set_dtype(dtype, *args)  # which says why that cannot be

    def settle(module: torch.nn.Module, _name: str, tensor: torch.Tensor | None) -> None:
        if dtypes and tensor is not None and threading.get_ident() == thread:
            _settle(module, tensor, dtypes[-1])

    thread = threading.get_ident()
    hooks = torch.nn.modules.module
    with (
        _RandomNumbers(),
        for_this_thread(modeling_utils, "local_torch_dtype", local_torch_dtype) as set_dtype,
        for_this_thread(initialization, "no_tie_weights", lambda: _stacked(untied, None)),
        for_this_thread(
            PreTrainedModel,
            "tie_weights",
            lambda *args, **kwargs: None if untied else tie_weights(*args, **kwargs),
        ) as tie_weights,
        for_this_thread(initialization, "meta_device_safe_creation_ops", _LinspaceOnCpu),
        for_this_thread(
            torch, "get_default_dtype", lambda: dtypes[-1] if dtypes else _process_default()
        ),
        hooks.register_module_parameter_registration_hook(settle),
        hooks.register_module_buffer_registration_hook(settle),
    ):
        yield


@contextmanager
def _stacked(
    stack: list[Any], value: Any, within: AbstractContextManager[Any] | None = None
) -> Iterator[None]:
    """Have ``value`` on top of ``stack`` meanwhile, and be in ``within``."""
    stack.append(value)
    try:
        with within or nullcontext():
            yield
    finally:
        stack.pop()


def _settle(module: torch.nn.Module, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Give a tensor of ``module`` that ``torch.Tensor(...)`` has made the dtype that it would have had.

    No mode sees that call. Its result is on the CPU, while other tensors of the process's default dtype are on the meta
    device, or ``torch.FloatTensor`` has made them.
    """
    if tensor.device.type == "cpu" and tensor.dtype is _process_default():
        names = _names_in_init(type(module))
        if "Tensor" in names and "FloatTensor" not in names:
            tensor.data = tensor.data.to(dtype)


def _names_in_init(kind: type) -> set[str]:
    """The attributes that constructors of a module's class mention."""
    own = kind.__mro__[: kind.__mro__.index(torch.nn.Module)]
    codes = [getattr(vars(each).get("__init__"), "__code__", None) for each in own]
    return {name for code in codes if code is not None for name in code.co_names}
