"""How each parameter of a model is made from bytes of the checkpoint.

transformers loads a checkpoint by operations on tensors: most parameters are views of one checkpoint tensor, some are
stacked, concatenated or split, a few are transposed, permuted or cast. Here the same operations run on ``Tracer``s,
tensors without data that record the operations that made them. The result is a ``Recipe`` per parameter.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.byte_runs import Run
from layerstream.pipeline.modeling.tracer_tensor import (
    VOID,
    Node,
    Operation,
    Output,
    Source,
    Tracer,
    collect_history,
)
from layerstream.stages.errors import ModelError

__all__ = ["Recipe", "SourcePiece"]


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
    """Laid one behind the other they are the contiguous parameter; None if it has to be computed by ``replay``."""
    scratch_bytes: int
    """Upper bound of the new memory that a replay takes, its result included.

    0 if the parameter is a view of one checkpoint tensor. transformers then computes with the bytes where they are in
    the mapped file, so equal bits need an address equal to the file's modulo 64; anything else is in memory of its
    own, which torch aligns to 64 bytes.
    """
    value: Node = field(repr=False, compare=False)
    """The result of the last operation; for ``replay``."""
    operations: tuple[Operation, ...] = field(repr=False, compare=False)
    """The recorded operations, in order."""

    @classmethod
    def of(cls, name: str, tracer: Tracer) -> Self:
        """The recipe of the parameter ``name``, for which loading has produced ``tracer``."""
        nodes, operations = collect_history(tracer.value)
        if any(node is VOID for node in nodes):
            raise ModelError(
                f"Loading mixes {name} with a tensor that has no data, so it cannot be followed; load "
                "this model with transformers' from_pretrained instead."
            )
        if any(
            torch.Tag.nondeterministic_seeded in getattr(op.function, "tags", ())
            for op in operations
        ):
            raise ModelError(
                f"Loading puts random numbers into {name}, which cannot be followed; load this model "
                "with transformers' from_pretrained instead."
            )
        sources = {node.name: node for node in nodes if isinstance(node, Source)}
        is_written = any(node.storage.writes for node in nodes)
        # Pieces make a contiguous tensor. A strided one has to stay strided: kernels may add up in
        # another order for another layout.
        is_contiguous = torch.empty(tracer.shape, device="meta").stride() == tracer.stride()
        runs = tracer.runs if is_contiguous and not is_written else None
        return cls(
            name=name,
            dtype=str(tracer.dtype).removeprefix("torch."),
            shape=tuple(tracer.shape),
            sources=tuple(sources),
            pieces=None if runs is None else tuple(_pieces(runs)),
            scratch_bytes=sum(op.fresh_bytes for op in operations)
            + sum(source.nbytes for source in sources.values() if source.storage.writes),
            value=tracer.value,
            operations=operations,
        )

    def replay(self, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the recorded operations on real tensors, on the device where they are.

        Args:
            sources: Each of ``self.sources``, contiguous, with the checkpoint's dtype and shape.

        Returns:
            The parameter, bit for bit and stride for stride what transformers makes; a view of its
            source where transformers makes a view.
        """
        results: dict[int, Any] = {}
        device = next(iter(sources.values())).device
        copies: dict[str, torch.Tensor] = {}

        def to_tensor(node: Any) -> Any:
            if isinstance(node, Source):
                if not node.storage.writes:
                    return sources[node.name]
                if node.name not in copies:  # other recipes use the same source
                    copies[node.name] = sources[node.name].clone()
                return copies[node.name]
            if isinstance(node, torch.Tensor):
                return node.to(device)
            if not isinstance(node, Output):
                return node
            return pytree.tree_leaves(results[id(node.operation)])[node.index]

        with torch.no_grad():
            for operation in self.operations:
                args, kwargs = pytree.tree_map(to_tensor, operation.arguments)
                results[id(operation)] = operation.function(*args, **kwargs)
            result: torch.Tensor = to_tensor(self.value)
        return result


def _pieces(runs: Iterable[Run]) -> Iterator[SourcePiece]:
    offset = 0
    for run in runs:
        yield SourcePiece(
            source=run.source, source_offset=run.start, offset=offset, nbytes=run.nbytes
        )
        offset += run.nbytes
