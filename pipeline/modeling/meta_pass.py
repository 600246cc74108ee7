"""Forward passes on the meta device: made-up values let them go on, and nothing of them stays in the process."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["meta_pass", "on_meta"]

_aten = torch.ops.aten

# A loop that waits for a value to change would never end.
_MAX_FAKE_VALUES = 10_000

# Two passes at once might leave each other's replacements in place for good.
_META_PASS_LOCK = threading.RLock()


def meta_pass(
    model: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    observers: Iterable[AbstractContextManager[Any]] = (),
    then: Callable[[Any], object] = lambda _: None,
    padded: bool = False,
) -> Any:
    """The output of a pass of ``model``, whose weights are on the meta device.

    Args:
        model: A clone: the pass may change its attributes.
        inputs: Its arguments, on the meta device, too.
        observers: Modes of torch, which see what the pass does; the last one sees it first.
        then: What is done with the output, seen by the observers.
        padded: Whether sequences of the batch have different lengths.
    """
    with torch.no_grad(), on_meta(), _FakeValues(padded=padded), ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer)
        output = model(**inputs)
        then(output)
    return output


@contextmanager
def on_meta() -> Iterator[None]:
    """Make this thread's new tensors on the meta device, and keep transformers from caching any of them.

    Models have functions that cache their results for the whole process (tables of relative positions), not always by
    device. A cached meta tensor gives wrong numbers without an error in later passes, those of models that other code
    has loaded included. Flexible attention is compiled for the shapes that it sees, and in another way when it sees further
    ones: a pass on the meta device would change the last bits of other models.
    """
    from transformers import pytorch_utils
    from transformers.integrations import flex_attention

    compiled: Any = getattr(flex_attention, "WrappedFlexAttention", None)
    with _META_PASS_LOCK, torch.device("meta"), ExitStack() as replaced:
        # transformers caches nothing while this is true.
        replaced.enter_context(
            _replaced_in_thread(pytorch_utils, "is_torchdynamo_compiling", lambda: True)
        )
        if compiled is not None:
            replaced.enter_context(
                _replaced_in_thread(compiled, "__call__", lambda _: _flex_shapes)
            )
        yield


@contextmanager
def _replaced_in_thread(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Have the calling thread get ``function`` in place of an attribute; others get what was there."""
    thread = threading.get_ident()
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == thread else original)(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _flex_shapes(query: torch.Tensor, _: Any, value: torch.Tensor, **options: Any) -> Any:
    """What flexible attention returns, without values."""
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if options.get("return_aux") is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return output, AuxOutput(lse=sums)
    return (output, sums) if options.get("return_lse") else output


class _FakeValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes up the values that a model reads from tensors, so that a pass on the meta device goes on.

    Args:
        padded: Whether sequences of the batch have different lengths: then a mask is not true everywhere.
    """

    def __init__(self, *, padded: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values_left = _MAX_FAKE_VALUES
        self._padded = padded
        self._all_true: weakref.ref[torch.Tensor] | None = None

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make up the result of an operation that needs values."""
        if func in {_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default}:  # noqa: SLF001
            self._values_left -= 1
            if self._values_left < 0:
                raise RuntimeError("the model keeps asking for values")
            tensor = args[0]
            if func is _aten.nonzero.default:  # every element is taken for true
                shape = (tensor.numel(), tensor.dim())
                return torch.empty(shape, dtype=torch.long, device="meta")
            if func is _aten.equal.default or tensor.dtype is torch.bool:
                return self._all_true is None or tensor is not self._all_true()
            return 1.0 if tensor.is_floating_point() else 1
        if func is _aten._grouped_mm.default and args[0].is_meta:  # noqa: SLF001
            return _grouped_mm(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        # transformers also compares the sum of a mask with the number of its elements.
        if self._padded and (
            func is _aten.all.default or (func is _aten.eq.Scalar and not args[0].dim())
        ):
            self._all_true = weakref.ref(result)
        return result


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """The product of experts: on the meta device torch takes bfloat16 only, while its kernels take other dtypes too."""
    in_bfloat16 = [
        each.bfloat16() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in args
    ]
    result: torch.Tensor = func(*in_bfloat16, **kwargs)
    return result if kwargs.get("out_dtype") else result.to(args[0].dtype)
