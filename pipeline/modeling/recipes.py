"""How each parameter of a model is made from bytes of the checkpoint.

transformers loads a checkpoint by operations on tensors: most parameters are views of one
checkpoint tensor, some are stacked, concatenated or split, a few are transposed, permuted or cast.
Here the same operations run on `Tracer`s: tensors with a shape and a dtype but no data, each of
which remembers the operations that made it. The result is a `Recipe` per parameter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.byte_runs import Run, Runs, merge, place
from layerstream.stages.errors import ModelError

__all__ = ["Recipe", "SourcePiece", "Tracer"]

_aten = torch.ops.aten

_NUMBERS = count()

_IDENTITIES = frozenset({_aten.alias.default, _aten.detach.default})


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePiece:
    """A run of bytes that is the same in a checkpoint tensor and in a parameter."""

    source: str
    """The checkpoint tensor."""
    source_offset: int
    """Where the run starts in the checkpoint tensor, in bytes."""
    offset: int
    """Where the run starts in the contiguous parameter, in bytes."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a parameter or persistent buffer is made from checkpoint tensors."""

    name: str
    """The parameter or buffer in the module tree."""
    dtype: str
    """The parameter's dtype, as torch calls it: "bfloat16"."""
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """The checkpoint tensors that it is made from, in order of first use."""
    pieces: tuple[SourcePiece, ...] | None
    """Laid one behind the other they are the contiguous parameter; None if it takes a `replay`."""
    scratch_bytes: int
    """Upper bound of the fresh memory that a replay takes, its result included.

    0 tells that the parameter is a view of one checkpoint tensor. transformers then computes with
    the bytes where they lie in the mapped file, so equal bits need an address equal to the file's
    modulo 64; anything else lies in memory of its own, which torch aligns to 64 bytes.
    """
    value: "_Node" = field(repr=False, compare=False)
    """What the last of the operations makes; for `replay`."""
    operations: tuple["_Operation", ...] = field(repr=False, compare=False)
    """The recorded operations, in order."""

    @classmethod
    def of(cls, name: str, tracer: "Tracer") -> Self:
        """The recipe for the parameter `name` that loading left as `tracer`."""
        nodes, operations = _history(tracer.value)
        if any(node is _VOID for node in nodes):
            raise ModelError(
                f"Loading mixes {name} with a tensor that has no data, so it cannot be followed; load "
                "this model with transformers' from_pretrained instead."
            )
        if any(torch.Tag.nondeterministic_seeded in op.function.tags for op in operations):
            raise ModelError(
                f"Loading puts random numbers into {name}, which cannot be followed; load this model "
                "with transformers' from_pretrained instead."
            )
        sources = {node.name: node for node in nodes if isinstance(node, _Source)}
        written = any(node.memory.writes for node in nodes)
        # Pieces make a contiguous tensor. A strided one has to stay strided: kernels may add up in
        # another order for another layout.
        contiguous = torch.empty(tracer.shape, device="meta").stride() == tracer.stride()
        runs = tracer.runs if contiguous and not written else None
        return cls(
            name=name,
            dtype=str(tracer.dtype).removeprefix("torch."),
            shape=tuple(tracer.shape),
            sources=tuple(sources),
            pieces=None if runs is None else tuple(_pieces(runs)),
            scratch_bytes=sum(op.fresh_bytes for op in operations)
            + sum(source.nbytes for source in sources.values() if source.memory.writes),
            value=tracer.value,
            operations=operations,
        )

    def replay(self, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the recorded operations on real tensors, on the device where they are.

        Args:
            sources: Each of `self.sources`, contiguous, with the checkpoint's dtype and shape.

        Returns:
            The parameter, bit for bit and stride for stride what transformers makes; a view of its
            source where transformers makes a view.
        """
        results: dict[int, Any] = {}
        device = next(iter(sources.values())).device
        copies: dict[str, torch.Tensor] = {}

        def real(node: Any) -> Any:
            if isinstance(node, _Source):
                if not node.memory.writes:
                    return sources[node.name]
                if node.name not in copies:  # others make theirs from the same source
                    copies[node.name] = sources[node.name].clone()
                return copies[node.name]
            if isinstance(node, torch.Tensor):
                return node.to(device)
            if not isinstance(node, _Output):
                return node
            return pytree.tree_leaves(results[id(node.operation)])[node.index]

        with torch.no_grad():
            for operation in self.operations:
                args, kwargs = pytree.tree_map(real, operation.arguments)
                results[id(operation)] = operation.function(*args, **kwargs)
            result: torch.Tensor = real(self.value)
        return result


@dataclass(slots=True)
class _Memory:
    """What a tensor and its views have in common."""

    writes: list["_Operation"] = field(default_factory=list)
    """What has changed it in place, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A checkpoint tensor."""

    name: str
    nbytes: int
    memory: _Memory


@dataclass(frozen=True, slots=True, eq=False)
class _Operation:
    """One recorded call; nodes stand in `arguments` where tensors stood."""

    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    fresh_bytes: int
    """What its results take if they are no views."""
    number: int = field(default_factory=_NUMBERS.__next__)
    """Operations have rising numbers in the order in which they ran."""


@dataclass(frozen=True, slots=True, eq=False)
class _Output:
    """One of the tensors that an operation returns."""

    operation: _Operation
    index: int
    memory: _Memory


@dataclass(frozen=True, slots=True, eq=False)
class _Void:
    """A tensor without data that is not the checkpoint's."""

    memory: _Memory


_VOID = _Void(_Memory())

_Node = _Source | _Output | _Void


class Tracer(torch.Tensor):
    """A tensor without data that remembers how it was made.

    It claims to be on the meta device and ignores requests to move: where real tensors are is decided when they
    are replayed. Tracers share no mutable state except a flag that is only ever set, so any number of threads may
    use them.
    """

    twin: torch.Tensor
    """A meta tensor of equal shape, dtype and strides, from which operations compute theirs."""
    value: _Node
    runs: Runs | None
    """The checkpoint bytes that are its elements in logical order; None if no run of bytes is."""

    # As torch's own wrappers do: what counts is what arrives at __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @staticmethod
    def __new__(cls: type[Self], twin: torch.Tensor, *, value: _Node, runs: Runs | None) -> Self:
        """Wrap a meta tensor."""
        tracer: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's own idiom
            cls,
            twin.shape,
            strides=twin.stride(),
            storage_offset=twin.storage_offset(),
            dtype=twin.dtype,
            device=torch.device("meta"),
        )
        tracer.twin, tracer.value, tracer.runs = twin, value, runs
        return tracer

    @classmethod
    def source(cls, name: str, *, shape: Sequence[int], dtype: torch.dtype) -> "Tracer":
        """The tracer of a checkpoint tensor."""
        twin = torch.empty(shape, dtype=dtype, device="meta")
        value = _Source(name, twin.nbytes, _Memory())
        return cls(twin, value=value, runs=merge([Run(name, 0, twin.nbytes)]))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Tracer({tuple(self.shape)}, {self.dtype}, {self.value})"

    @property  # type: ignore[override]
    def data(self) -> "Tracer":
        """As torch's; a setter of torch's own would change the tensor and not what it says."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, other: "Tracer") -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.twin, self.value, self.runs = other.twin, other.value, other.runs

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record an operation."""
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "device"}
        if func in _IDENTITIES or (func is _aten._to_copy.default and _keeps(args[0], **kwargs)):  # noqa: SLF001
            return cls(args[0].twin, value=args[0].value, runs=args[0].runs)
        if func._schema.is_mutable:  # noqa: SLF001 - no public way to ask
            return _note_write(func, args, kwargs)
        result = func(*pytree.tree_map(_twin, args), **pytree.tree_map(_twin, kwargs))
        twins, structure = pytree.tree_flatten(result)
        is_view = func.is_view or func is _aten._unsafe_view.default  # noqa: SLF001
        memory = args[0].value.memory if is_view else None
        operation = _Operation(
            function=func,
            arguments=pytree.tree_map(_node, (args, kwargs)),
            fresh_bytes=0 if is_view else sum(twin.nbytes for twin in twins),
        )
        tracers = [
            cls(twin, value=_Output(operation, index, memory or _Memory()), runs=runs)
            for index, (twin, runs) in enumerate(
                zip(twins, place(func, args, kwargs, results=len(twins)), strict=True)
            )
        ]
        return pytree.tree_unflatten(tracers, structure)


def _note_write(func: Any, args: Any, kwargs: Any) -> Tracer:
    """Record an in-place operation in the recipes that it affects.

    Initialising a model overwrites what it takes for new. Mostly that is a temporary (a weight that
    weight_norm has just computed) that nobody looks at again; but a row of a loaded table counts as
    new as well.
    """
    if not isinstance(args[0], Tracer):
        raise ModelError(
            f"Loading this model computes something else from its weights ({func}), which takes "
            "their values; load it with transformers' from_pretrained instead."
        )
    args[0].value.memory.writes.append(
        _Operation(function=func, arguments=pytree.tree_map(_node, (args, kwargs)), fresh_bytes=0)
    )
    return args[0]


def _keeps(tracer: Tracer, *, dtype: torch.dtype | None = None, **kwargs: Any) -> bool:
    """Whether a `.to()` returns the tensor itself, once its device is left aside."""
    same = {None, False, torch.strided, torch.preserve_format}
    return dtype in {None, tracer.dtype} and all(
        value in same for key, value in kwargs.items() if key != "non_blocking"
    )


def _twin(leaf: Any) -> Any:
    if isinstance(leaf, Tracer):
        return leaf.twin
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _node(leaf: Any) -> Any:
    if isinstance(leaf, Tracer):
        return leaf.value
    return _VOID if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf


def _history(value: _Node) -> tuple[list[_Node], tuple[_Operation, ...]]:
    """Everything that a value is made from, including itself, and the operations in order."""
    nodes: dict[int, _Node] = {}
    operations: dict[int, _Operation] = {}
    left: list[Any] = [value]
    while left:
        node = left.pop()
        if not isinstance(node, _Node) or id(node) in nodes:
            continue
        nodes[id(node)] = node
        makers = [*node.memory.writes, *([node.operation] if isinstance(node, _Output) else [])]
        for operation in makers:
            if operation.number not in operations:
                operations[operation.number] = operation
                left += reversed(pytree.tree_leaves(operation.arguments))
    return list(nodes.values()), tuple(operations[number] for number in sorted(operations))


def _pieces(runs: Iterable[Run]) -> Iterator[SourcePiece]:
    offset = 0
    for run in runs:
        yield SourcePiece(
            source=run.source, source_offset=run.start, offset=offset, nbytes=run.nbytes
        )
        offset += run.nbytes
