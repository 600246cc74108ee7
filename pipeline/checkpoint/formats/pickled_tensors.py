"""What a pickle of torch.save may hold and call: names, storages, tensors, dicts. They are described, not made."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = [
    "CALLS",
    "STORAGE_DTYPES",
    "PickledDict",
    "PickledName",
    "PickledOrderedDict",
    "PickledStorage",
    "PickledTensor",
    "fill",
    "is_dtype",
    "is_size",
]


@dataclass(frozen=True, slots=True, eq=False)
class PickledStorage:
    """Memory that tensors share."""

    key: str
    dtype: str
    """torch's name, without ``torch.``; "uint8" for untyped memory."""
    values: int


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """A tensor, as the pickle describes it."""

    storage: PickledStorage
    dtype: str
    offset: int
    """In values of ``dtype``, from the start of the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In values."""


class PickledName(NamedTuple):
    """Something that a pickle would import."""

    name: str


class PickledDict(dict[Any, Any]):
    """A dict."""


class PickledOrderedDict(PickledDict):
    """Another, which may have attributes: nobody needs them."""


STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "storage.UntypedStorage": "uint8",
}  # fmt: skip
# Those of safetensors, without the packed one.
_DTYPES = frozenset(
    {
        *STORAGE_DTYPES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
        "float8_e5m2fnuz", "float8_e8m0fnu",
    }
)  # fmt: skip
_MAX_NUMBER = 2**60
_KEYS = (str, int, float, bytes, type(None))


def is_dtype(name: str) -> bool:
    """Whether ``name`` is that of a dtype which checkpoints may have."""
    return name.startswith("torch.") and name.removeprefix("torch.") in _DTYPES


def is_size(value: Any) -> bool:
    """Whether a value can be a size, a stride or an offset."""
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def _tensor(  # noqa: PLR0917 - torch's own arguments
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    _hooks: Any,
    metadata: Any = None,
) -> PickledTensor:
    dtype = storage.dtype if type(storage) is PickledStorage else ""
    return _checked(storage, offset, (shape, strides), dtype, (requires_grad, metadata))


def _typed_tensor(  # noqa: PLR0917 - torch's own arguments
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> PickledTensor:
    """Make a tensor of a dtype that has no storage of its own."""
    if type(dtype) is not PickledName or not is_dtype(dtype.name):
        raise ValueError("damaged: a tensor has no dtype")
    if requires_grad is not False:
        raise ValueError(f"of a tensor of {dtype.name} with a gradient, which torch cannot load")
    name = dtype.name.removeprefix("torch.")
    return _checked(storage, offset, (shape, strides), name, (requires_grad, metadata))


def _checked(
    storage: Any, offset: Any, layout: tuple[Any, Any], dtype: str, options: tuple[Any, Any]
) -> PickledTensor:
    shape, strides = layout
    sizes_match = type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides)
    if type(storage) is not PickledStorage or not sizes_match:
        raise ValueError("damaged: a tensor has no storage or no shape")
    if not all(is_size(number) for number in (offset, *shape, *strides)):
        raise ValueError("of a tensor with impossible sizes")
    requires_grad, metadata = options
    _check_gradient(requires_grad, dtype)
    if metadata:
        raise ValueError("of a tensor with pending operations (conjugated or negated)")
    return PickledTensor(storage, dtype, offset, shape, strides)


def _check_gradient(requires_grad: Any, dtype: str) -> None:
    if type(requires_grad) is not bool or (requires_grad and "float" not in dtype):
        raise ValueError("damaged: a tensor of integers has a gradient")


def _parameter(data: Any, requires_grad: Any, *_: Any) -> PickledTensor:
    if type(data) is not PickledTensor:
        raise ValueError("damaged: a parameter is no tensor")
    _check_gradient(requires_grad, data.dtype)
    return data


def _ordered_dict(items: Any = ()) -> PickledDict:
    found = PickledOrderedDict()
    fill(found, items)
    return found


def fill(target: PickledDict, items: Iterable[Any]) -> None:
    """Set items of a dict.

    Raises:
        ValueError: A key is none that a dict of tensors has.
    """
    for key, value in items:
        if type(key) not in _KEYS:  # hashing tuples of tuples can take for ever
            raise ValueError(f"of a dict with a {type(key).__name__} as a key")
        target[key] = value


def _size(numbers: Any) -> tuple[int, ...]:
    if type(numbers) is not tuple or not all(is_size(number) for number in numbers):
        raise ValueError("damaged: a shape is no tuple")
    return numbers


CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
