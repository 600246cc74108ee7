"""Which bytes of a checkpoint a tensor is made of, as long as operations only place them.

A tensor's bytes in logical (row by row) order are given as runs of bytes of checkpoint tensors, whatever its strides.
Reshapes leave the runs as they are, slices and splits cut them, concatenation and stacking join them; after any other
operation the tensor has none.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

__all__ = ["Run", "Runs", "merge_runs", "propagate_runs"]

# Each run becomes a segment of its own in the plan (about 100 bytes of JSON) and in the transfer (a copy of its own,
# some microseconds). Fused experts need two per expert, at most about a thousand today. A tensor that needs more is cut
# across its rows, in runs of some KiB; a replay does that better, with one strided copy.
_MAX_RUNS = 4096

_aten = torch.ops.aten

# Results of these hold elements of their input in an order that depends only on logical positions: not on strides
# (as_strided), and not on values (_conj, _neg_view).
_VIEWS = frozenset(
    {
        _aten.clone.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.unbind.int,
        _aten.unsqueeze.default,
        _aten.view.default,
        _aten.view.dtype,
        _aten._unsafe_view.default,  # noqa: SLF001 - reshape ends in it
    }
)


class Run(NamedTuple):
    """A run of bytes of a checkpoint tensor."""

    source: str
    """The checkpoint tensor."""
    start: int
    """Where in it the run starts, in bytes."""
    nbytes: int


Runs = tuple[Run, ...]


def propagate_runs(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, results: int
) -> Sequence[Runs | None]:
    """The runs of each result of a torch operation.

    Args:
        func: The operation, an OpOverload.
        args: Its arguments. Tensors that come from the checkpoint have an attribute ``runs``.
        kwargs: Its keyword arguments.
        results: How many tensors it returns.

    Returns:
        For each result its runs; None if the operation does more than place bytes, or for more than 4096 runs.
    """
    # Tying weights pads biases, mostly by nothing, which is a clone.
    is_unpadded = func is _aten.constant_pad_nd.default and not any(args[1])
    if (func in _VIEWS or is_unpadded) and args[0].runs is not None:
        return _runs_of_views(func, *args, **kwargs)
    if func in {_aten.cat.default, _aten.stack.default} and _can_join(args[0]):
        tensors = args[0]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        # Stacking along a dimension orders bytes as concatenating along it does.
        dims = tensors[0].dim() + (func is _aten.stack.default)
        return [_runs_of_joined(tensors, rows=math.prod(tensors[0].shape[: dim % dims]))]
    return [None] * results


def merge_runs(runs: Iterable[Run]) -> Runs | None:
    """Join runs that are contiguous in their source; None if too many remain."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last is not None and (last.source, last.start + last.nbytes) == run[:2]:
            merged[-1] = last._replace(nbytes=last.nbytes + run.nbytes)
        elif run.nbytes:
            merged.append(run)
        if len(merged) > _MAX_RUNS:
            return None
    return tuple(merged)


def _runs_of_views(func: Any, whole: Any, *args: Any, **kwargs: Any) -> list[Runs | None]:
    """Let torch take the same views of a contiguous tensor; their strides show which bytes go where."""
    starts = list(accumulate((run.nbytes for run in whole.runs), initial=0))
    contiguous = torch.empty(whole.shape, dtype=whole.dtype, device="meta")
    results: list[Runs | None] = []
    for view in pytree.tree_leaves(func(contiguous, *args, **kwargs)):
        spans = _spans(view)
        results.append(
            None
            if spans is None
            else merge_runs(run for span in spans for run in _cut(whole.runs, starts, *span))
        )
    return results


def _spans(view: torch.Tensor) -> list[tuple[int, int]] | None:
    """The bytes of a contiguous tensor that a view of it holds, as (start, end).

    None if the view does not visit them in rising order, or if they are too many.
    """
    if view.numel() == 0:
        return []
    dims = [
        (int(size), int(step))
        for size, step in zip(view.shape, view.stride(), strict=True)
        if size > 1
    ]
    row = 1
    while dims and dims[-1][1] == row:
        row *= dims.pop()[0]
    extent = row
    for size, step in reversed(dims):
        if step < extent:
            return None
        extent = step * size
    if math.prod(size for size, _ in dims) > _MAX_RUNS:
        return None
    rows = product(*(range(0, size * step, step) for size, step in dims))
    first = int(view.storage_offset())
    itemsize = view.element_size()
    return [
        (begin * itemsize, (begin + row) * itemsize)
        for begin in (first + sum(position) for position in rows)
    ]


def _can_join(tensors: Sequence[torch.Tensor]) -> bool:
    # torch promotes mixed dtypes, and accepts empty tensors of any rank.
    return (
        all(getattr(tensor, "runs", None) is not None for tensor in tensors)
        and len({(tensor.dtype, tensor.dim()) for tensor in tensors}) == 1
    )


def _runs_of_joined(tensors: Sequence[Any], *, rows: int) -> Runs | None:
    """The runs of tensors of ``rows`` rows each: the first row of each, the second row of each..."""
    if rows > _MAX_RUNS:
        return None
    parts = [
        (tensor.runs, list(accumulate((run.nbytes for run in tensor.runs), initial=0)))
        for tensor in tensors
    ]
    return merge_runs(
        run
        for row in range(rows)
        for runs, starts in parts
        for run in _cut(runs, starts, row * starts[-1] // rows, (row + 1) * starts[-1] // rows)
    )


def _cut(runs: Runs, starts: Sequence[int], begin: int, end: int) -> Iterator[Run]:
    """The bytes ``begin`` to ``end`` of runs; ``starts`` tells where each run starts."""
    index = bisect_right(starts, begin) - 1
    while begin < end:
        source, start, nbytes = runs[index]
        skip = begin - starts[index]
        taken = min(nbytes - skip, end - begin)
        yield Run(source, start + skip, taken)
        begin += taken
        index += 1
