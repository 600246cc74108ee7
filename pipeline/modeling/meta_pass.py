"""Forward passes on the meta device: made-up values let them go on, and nothing of them stays in the process."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerstream.pipeline.modeling.replacing import for_this_thread

__all__ = ["meta_pass", "on_meta", "put_on_meta"]

_aten = torch.ops.aten

# A loop that waits for a value to change would never end.
_MAX_FAKE_VALUES = 10_000

# Operations whose results, or the shapes of these, depend on values.
_ASKING = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default}  # noqa: SLF001

# Two passes at once might leave each other's replacements in place for good.
_META_PASS_LOCK = threading.RLock()


def meta_pass(
    model: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    observers: Iterable[AbstractContextManager[Any]] = (),
    then: Callable[[Any], object] = lambda _: None,
    padded: bool = False,
    answer: bool = True,
) -> Any:
    """The output of a pass of ``model``, whose weights are on the meta device.

    Args:
        model: A clone: the pass may change its attributes.
        inputs: Its arguments, on the meta device, too.
        observers: Modes of torch, which see what the pass does; the last one sees it first.
        then: What is done with the output, seen by the observers.
        padded: Whether sequences of the batch have different lengths.
        answer: What the model is told where it asks whether a condition holds.
    """
    with (
        torch.no_grad(),
        on_meta(),
        _FakeValues(padded=padded, answer=answer),
        ExitStack() as stack,
    ):
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
    # A lock of its own: a pass of a request does not wait until another model is built.
    replaced = partial(for_this_thread, lock=_META_PASS_LOCK)
    with torch.device("meta"), ExitStack() as stack:
        # transformers caches nothing while this is true.
        stack.enter_context(replaced(pytorch_utils, "is_torchdynamo_compiling", lambda: True))
        if compiled is not None:
            stack.enter_context(replaced(compiled, "__call__", lambda _: _flex_shapes))
        yield


def put_on_meta(clone: nn.Module) -> dict[str, torch.Tensor]:
    """Put meta tensors in place of what a clone has values of; returns them, without plain attributes, by their paths.

    Parameters that are on the meta device get copies: a model that converts its modules changes them in place.
    """
    moved: dict[str, torch.Tensor] = {}
    copies: dict[int, nn.Parameter] = {}
    for path, module in clone.named_modules():
        attributes = vars(module)
        tables = {name: dict(attributes[name]) for name in ("_parameters", "_buffers")}
        attributes.update(tables)
        for table in tables.values():
            for name, tensor in table.items():
                if tensor is not None and not tensor.is_meta:
                    moved[f"{path}.{name}" if path else name] = table[name] = tensor.to("meta")
                elif type(tensor) is nn.Parameter:
                    copied = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
                    table[name] = copies.setdefault(id(tensor), copied)
        # Tables of positions may be plain attributes.
        for name, value in list(attributes.items()):
            if type(value) is torch.Tensor and not value.is_meta:
                attributes[name] = value.to("meta")
    return moved


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
        answer: Whether conditions hold.
    """

    def __init__(self, *, padded: bool, answer: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values_left = _MAX_FAKE_VALUES
        self._padded, self._answer = padded, answer
        self._all_true: weakref.ref[torch.Tensor] | None = None

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make up the result of an operation that needs values."""
        # Numbers that are no tensors of the model have their values: sizes, and what is computed with them.
        if func in _ASKING and args[0].is_meta:
            self._values_left -= 1
            if self._values_left < 0:
                raise RuntimeError("the model keeps asking for values")
            tensor = args[0]
            if func is _aten.nonzero.default:
                return _nonzero(tensor)
            if func is _aten.equal.default or tensor.dtype is torch.bool:
                is_padding = self._all_true is not None and tensor is self._all_true()
                return self._answer and not is_padding
            return 1.0 if tensor.is_floating_point() else 1
        if func is _aten.index.Tensor and args[0].is_meta:
            args = (args[0], _numbers_of(args[1]))
        if func is _aten._grouped_mm.default and args[0].is_meta:  # noqa: SLF001
            return _grouped_mm(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        # transformers also compares the sum of a mask with the number of its elements.
        if self._padded and (
            func is _aten.all.default or (func is _aten.eq.Scalar and not args[0].dim())
        ):
            self._all_true = weakref.ref(result)
        return result


def _nonzero(tensor: torch.Tensor) -> torch.Tensor:
    """The indices of all elements: each is taken for true."""
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.long, device="meta")


def _numbers_of(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """``indices`` with numbers in place of masks, for which torch asks on the meta device where no mode sees it."""
    numbers: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in {torch.bool, torch.uint8}:
            numbers += _nonzero(index).unbind(1)
        else:
            numbers.append(index)
    return numbers


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """The product of experts: on the meta device torch takes bfloat16 only, and rows of multiples of 16 bytes; its kernels on a CPU take others, too."""
    left, right, *rest = args
    if left.dim() == 2 and right.dim() == 3 and (rest or kwargs.get("offs") is not None):  # noqa: PLR2004 - rows, and a matrix for each group of them
        out_dtype = kwargs.get("out_dtype") or left.dtype
        made: torch.Tensor = left.new_empty((left.shape[0], right.shape[2]), dtype=out_dtype)
        return made
    in_bfloat16 = [
        each.bfloat16() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in args
    ]
    result: torch.Tensor = func(*in_bfloat16, **kwargs)
    return result if kwargs.get("out_dtype") else result.to(args[0].dtype)
