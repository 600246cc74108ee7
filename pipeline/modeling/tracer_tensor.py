"""Tensors without data that record the operations that made them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.byte_runs import Run, Runs, merge_runs, propagate_runs
from layerstream.pipeline.modeling.wrapper_tensor import IDENTITIES, WrapperTensor
from layerstream.stages.errors import ModelError

__all__ = [
    "VOID",
    "Node",
    "Operation",
    "Output",
    "Source",
    "Tracer",
    "collect_history",
    "record_call",
]

_aten = torch.ops.aten

_OPERATION_NUMBERS = count()


@dataclass(slots=True)
class Storage:
    """The memory that a tensor shares with its views."""

    writes: list["Operation"] = field(default_factory=list)
    """The in-place operations on it, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A checkpoint tensor."""

    name: str
    nbytes: int
    storage: Storage


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One recorded call; nodes stand in ``arguments`` where tensors stood."""

    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    fresh_bytes: int
    """The memory that its results take; 0 if they are views."""
    number: int = field(default_factory=_OPERATION_NUMBERS.__next__)
    """Operations have rising numbers in the order in which they ran."""


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """One of the tensors that an operation returns."""

    operation: Operation
    index: int
    storage: Storage


@dataclass(frozen=True, slots=True, eq=False)
class Void:
    """A tensor without data that is not the checkpoint's."""

    storage: Storage


VOID = Void(Storage())

Node = Source | Output | Void


class Tracer(WrapperTensor):
    """A tensor without data that records how it was made.

    It claims to be on the meta device and ignores requests to move: where real tensors are is decided when the
    operations are replayed. Tracers of different models share no mutable state except the counter of operations, so
    models may be traced in several threads at once.
    """

    meta_tensor: torch.Tensor
    """A meta tensor of equal shape, dtype and strides, which operations are run on."""
    value: Node
    runs: Runs | None
    """The checkpoint bytes that are its elements in logical order; None if it is not made of such runs."""

    @staticmethod
    def __new__(
        cls: type[Self], meta_tensor: torch.Tensor, *, value: Node, runs: Runs | None
    ) -> Self:
        """Wrap a meta tensor."""
        tracer = cls.without_memory(
            meta_tensor.shape,
            strides=meta_tensor.stride(),
            storage_offset=int(meta_tensor.storage_offset()),
            dtype=meta_tensor.dtype,
            device=torch.device("meta"),
        )
        tracer.meta_tensor, tracer.value, tracer.runs = meta_tensor, value, runs
        return tracer

    @classmethod
    def source(cls, name: str, *, shape: Sequence[int], dtype: torch.dtype) -> "Tracer":
        """The tracer of a checkpoint tensor."""
        meta_tensor = torch.empty(shape, dtype=dtype, device="meta")
        value = Source(name, meta_tensor.nbytes, Storage())
        return cls(meta_tensor, value=value, runs=merge_runs([Run(name, 0, meta_tensor.nbytes)]))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Tracer({tuple(self.shape)}, {self.dtype}, {self.value})"

    @property  # type: ignore[override]
    def data(self) -> "Tracer":
        """As torch's; torch's own setter would change the tensor but not its recorded history."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, other: "Tracer") -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.meta_tensor, self.value, self.runs = other.meta_tensor, other.value, other.runs

    def __setitem__(self, index: Any, value: Any) -> None:
        """As torch's, which makes a number a tensor first: one without data, on the meta device."""
        parts = index if isinstance(index, tuple) else (index,)
        is_view = not any(isinstance(part, torch.Tensor | list | bool) for part in parts)
        if is_view and isinstance(value, float | int):
            self[index].fill_(value)
        else:
            super().__setitem__(index, value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record an operation."""
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "device"}
        if func in IDENTITIES or (
            func is _aten._to_copy.default and _returns_self(args[0], **kwargs)  # noqa: SLF001
        ):
            return cls(args[0].meta_tensor, value=args[0].value, runs=args[0].runs)
        if func._schema.is_mutable:  # noqa: SLF001 - no public way to ask
            return _record_write(func, args, kwargs)
        result = func(*pytree.tree_map(_to_meta, args), **pytree.tree_map(_to_meta, kwargs))
        meta_tensors, structure = pytree.tree_flatten(result)
        is_view = func.is_view or func is _aten._unsafe_view.default  # noqa: SLF001
        storage = args[0].value.storage if is_view else None
        operation = Operation(
            function=func,
            arguments=pytree.tree_map(_to_node, (args, kwargs)),
            fresh_bytes=0 if is_view else sum(tensor.nbytes for tensor in meta_tensors),
        )
        runs_of_results = propagate_runs(func, args, kwargs, results=len(meta_tensors))
        tracers = [
            cls(tensor, value=Output(operation, index, storage or Storage()), runs=runs)
            for index, (tensor, runs) in enumerate(zip(meta_tensors, runs_of_results, strict=True))
        ]
        return pytree.tree_unflatten(tracers, structure)


def record_call(
    function: Callable[..., torch.Tensor],
    tracers: Sequence[Any],
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tracer:
    """Record a call of ``function`` with ``tracers``, whose result is contiguous and in memory of its own."""
    meta_tensor = torch.empty(shape, dtype=dtype, device="meta")
    operation = Operation(
        function=function,
        arguments=(tuple(tracer.value for tracer in tracers), {}),
        fresh_bytes=meta_tensor.nbytes,
    )
    return Tracer(meta_tensor, value=Output(operation, 0, Storage()), runs=None)


def collect_history(value: Node) -> tuple[list[Node], tuple[Operation, ...]]:
    """Everything that a value is made from, including itself, and the operations in order."""
    nodes: dict[int, Node] = {}
    operations: dict[int, Operation] = {}
    pending: list[Any] = [value]
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or id(node) in nodes:
            continue
        nodes[id(node)] = node
        makers = [*node.storage.writes, *([node.operation] if isinstance(node, Output) else [])]
        for operation in makers:
            if operation.number not in operations:
                operations[operation.number] = operation
                pending += reversed(pytree.tree_leaves(operation.arguments))
    return list(nodes.values()), tuple(operations[number] for number in sorted(operations))


def _record_write(func: Any, args: Any, kwargs: Any) -> Tracer:
    """Record an in-place operation in the recipes that it affects.

    Initialising a model overwrites what it takes for new. Mostly that is a temporary that is not used again (a weight
    that weight_norm has just computed), but a row of a loaded table counts as new as well.
    """
    if not isinstance(args[0], Tracer):
        raise ModelError(
            f"Loading this model computes something else from its weights ({func}), which takes "
            "their values; load it with transformers' from_pretrained instead."
        )
    args[0].value.storage.writes.append(
        Operation(function=func, arguments=pytree.tree_map(_to_node, (args, kwargs)), fresh_bytes=0)
    )
    return args[0]


def _returns_self(tracer: Tracer, *, dtype: torch.dtype | None = None, **kwargs: Any) -> bool:
    """Whether a ``.to()`` returns the tensor itself, apart from its device."""
    same = {None, False, torch.strided, torch.preserve_format}
    return dtype in {None, tracer.dtype} and all(
        value in same for key, value in kwargs.items() if key != "non_blocking"
    )


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, Tracer):
        return leaf.meta_tensor
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _to_node(leaf: Any) -> Any:
    if isinstance(leaf, Tracer):
        return leaf.value
    return VOID if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf
