"""Follows rows through the operations that arrange them: the operations run on numbers of rows in place of rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.tracer_tensor import Node, Operation, Output

__all__ = ["COPIES", "row_numbers"]

_aten = torch.ops.aten

# Operations whose second argument is a shape.
_RESHAPES = frozenset({_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default})  # noqa: SLF001
# Operations along the dimensions that their integer arguments name, with the positions of those arguments.
_ALONG = {
    _aten.cat.default: (1,),
    _aten.stack.default: (1,),
    _aten.transpose.int: (1, 2),
    _aten.select.int: (1,),
    _aten.slice.Tensor: (1,),
    _aten.split.Tensor: (2,),
    _aten.split_with_sizes.default: (2,),
    _aten.squeeze.dim: (1,),
    _aten.unbind.int: (1,),
    _aten.unsqueeze.default: (1,),
}
_GROWING = frozenset({_aten.stack.default, _aten.unsqueeze.default})
COPIES = frozenset({_aten.clone.default, _aten.contiguous.default})


def row_numbers(
    operations: Sequence[Operation],
    value: Node,
    unpacks: Sequence[Operation],
) -> torch.Tensor | None:
    """The recorded operations on row numbers ``[..., 1]`` in place of rows; those of later matrices follow."""
    results: dict[int, Any] = {}
    begin = 0
    for operation in unpacks:
        leading = operation.function.shape[:-1]
        end = begin + torch.Size(leading).numel()
        results[id(operation)] = torch.arange(begin, end).view(*leading, 1)
        begin = end
    columns = unpacks[0].function.shape[-1]
    for operation in operations:
        if id(operation) in results:
            continue
        function, (args, kwargs) = operation.function, operation.arguments
        if function is _aten._to_copy.default:  # noqa: SLF001
            results[id(operation)] = _value(args[0], results)
            continue
        made = _on_numbers(function, args, kwargs, columns, results)
        if made is None:
            return None
        results[id(operation)] = made
    found = _value(value, results)
    return found if isinstance(found, torch.Tensor) else None


def _value(node: Any, results: Mapping[int, Any]) -> Any:
    if isinstance(node, Output):
        made = results.get(id(node.operation))
        return None if made is None else pytree.tree_leaves(made)[node.index]
    return None if isinstance(node, Node) else node


def _on_numbers(
    function: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    columns: int,
    results: Mapping[int, Any],
) -> Any:
    """What ``function`` makes of tensors ``[..., 1]`` instead of ``[..., columns]``; None if the last dimension takes part."""
    if kwargs and set(kwargs) - {"memory_format"}:
        return None
    values = list(pytree.tree_map(lambda leaf: _value(leaf, results), args))
    first = values[0][0] if isinstance(values[0], (list, tuple)) else values[0]
    if not isinstance(first, torch.Tensor):
        return None
    last = first.dim() - 1
    if function in COPIES:
        return first
    if function in _RESHAPES:
        shape = list(values[1])
        keeps = bool(shape) and shape[-1] in {columns, -1}
        # Of rows that are permuted, too: where the operation was recorded, they had been copied.
        return first.reshape([*shape[:-1], 1]) if keeps else None
    if function is _aten.permute.default:
        return function(*values) if values[1][-1] % (last + 1) == last else None
    # A dimension that is left out is the first.
    named = [values[at] if at < len(values) else 0 for at in _ALONG.get(function, ())]
    dims = last + 1 + (function in _GROWING)
    keeps = bool(named) and all(dim % dims != dims - 1 for dim in named)
    return function(*values) if keeps else None
