"""What is read from the files for each parameter: the extents of its bytes, packed or plain."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.packed_form import PackedForm
from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.pipeline.modeling.binding import source_name
from layerstream.pipeline.modeling.gathered_table import (
    SMALL_WEIGHT_BYTES,
    empty_congruent,
)
from layerstream.pipeline.modeling.packed_rows import PackedRows
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.table_source import FileSpan, TableSource
from layerstream.pipeline.modeling.unpacking import Unpack
from layerstream.pipeline.planning.planned_layer import TensorSource
from layerstream.stages.batch import Extent
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.interruptible import InterruptibleReads

__all__ = [
    "extents_of",
    "make_fetch",
    "read_weight",
    "reading_bytes",
    "sources_of",
    "table_extents",
    "table_source",
    "unpacking_bytes",
    "whole_extent",
]


def extents_of(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Extent, ...]:
    """The parts of files that the recipe's tensor consists of."""
    extents = []
    for piece in recipe.pieces or ():
        info = checkpoint.tensors[piece.source]
        offset = info.offset + piece.source_offset
        extents.append(Extent(file=info.file, offset=offset, nbytes=piece.nbytes))
    return tuple(extents) or (Extent(file=0, offset=0, nbytes=0),)


def make_fetch(
    recipe: Recipe, checkpoint: Checkpoint, device: torch.device
) -> Callable[[], torch.Tensor] | None:
    """A function that reads a small parameter from its files; None for a large one."""
    extents = extents_of(recipe, checkpoint)
    if recipe.pieces is None or sum(extent.nbytes for extent in extents) > SMALL_WEIGHT_BYTES:
        return None

    def fetch() -> torch.Tensor:
        offset = 0 if recipe.scratch_bytes else extents[0].offset
        tensor = empty_congruent(recipe.shape, getattr(torch, recipe.dtype), offset)
        raw_bytes: Any = tensor.view(-1).view(torch.uint8).numpy()
        buffer = memoryview(raw_bytes).cast("B")
        spans, begin = [], 0
        for extent in extents:
            spans.append(
                FileSpan(extent.file, extent.offset, buffer[begin : begin + extent.nbytes])
            )
            begin += extent.nbytes
        with table_source(checkpoint, extents) as source:
            source.read_into(spans)
        return tensor.to(device)

    return fetch


def reading_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """The memory that ``read_weight`` takes, the weight included."""
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    weight = torch.Size(recipe.shape).numel() * dtype.itemsize
    if recipe.pieces is not None:
        return weight
    sources = sum(checkpoint.tensors[name].nbytes for name in recipe.sources)
    return sources + recipe.scratch_bytes + unpacking_bytes(recipe) + weight


def read_weight(recipe: Recipe, reader: SourceReader) -> torch.Tensor:
    """The whole of a recipe's tensor, in memory of its own on the CPU."""
    infos = reader.checkpoint.tensors
    if recipe.pieces is None:
        sources = {
            name: reader.read(infos[name], 0, infos[name].nbytes)
            .view(getattr(torch, infos[name].dtype))
            .view(infos[name].shape)
            for name in recipe.sources
        }
        return recipe.replay(sources)
    weight = torch.empty(recipe.shape, dtype=getattr(torch, recipe.dtype))
    raw = weight.view(-1).view(torch.uint8)
    for piece in recipe.pieces:
        piece_bytes = raw[piece.offset : piece.offset + piece.nbytes]
        reader.read_into(infos[piece.source], piece.source_offset, piece_bytes)
    return weight


def table_source(
    checkpoint: Checkpoint,
    extents: Iterable[Extent],
    guard: ReadGuard | None = None,
    reads: InterruptibleReads | None = None,
) -> TableSource:
    """What reads ``extents``, with the files open that they are in."""
    files = {extent.file: checkpoint.files[extent.file] for extent in extents}
    return TableSource(files, guard=guard, reads=reads)


def table_extents(
    recipe: Recipe, rows: PackedRows | None, checkpoint: Checkpoint
) -> tuple[Extent, ...]:
    """The parts of files that a gathered table's rows are in; ``rows`` if they are packed."""
    if rows is None:
        return extents_of(recipe, checkpoint)
    return tuple(whole_extent(checkpoint, matrix.parts[0]) for matrix in rows.matrices)


def sources_of(recipe: Recipe, checkpoint: Checkpoint) -> list[TensorSource]:
    """What is read for a recipe: its pieces, or the tensors that it is computed from."""
    if recipe.pieces is not None:
        return [
            TensorSource(
                name=recipe.name,
                dtype=recipe.dtype,
                shape=recipe.shape,
                extents=extents_of(recipe, checkpoint),
                copied=recipe.scratch_bytes > 0,
            )
        ]
    forms = _packed_forms(recipe)
    infos = [checkpoint.tensors[name] for name in recipe.sources]
    return [
        TensorSource(
            name=source_name(info.name),
            dtype=info.dtype,
            shape=info.shape,
            extents=(whole_extent(checkpoint, info.name),),
            packed=forms.get(info.name),
        )
        for info in infos
    ]


def _packed_forms(recipe: Recipe) -> dict[str, PackedForm]:
    """How the sources of ``recipe`` are packed, by their names; the first part stands for all of what they unpack to."""
    forms: dict[str, PackedForm] = {}
    item_bytes = getattr(torch, recipe.dtype).itemsize
    for operation in recipe.operations:
        if isinstance(unpack := operation.function, Unpack):
            nbytes = torch.Size(unpack.shape).numel() * item_bytes
            for part in operation.arguments[0]:
                forms[part.name] = PackedForm(unpack.packing.encoding, nbytes)
                nbytes = 0
    return forms


def unpacking_bytes(recipe: Recipe) -> int:
    """What unpacking the whole of ``recipe``'s sources on a GPU takes besides results, at most."""
    unpacks = [op.function for op in recipe.operations if isinstance(op.function, Unpack)]
    return max((unpack.temporary_bytes for unpack in unpacks), default=0)


def whole_extent(checkpoint: Checkpoint, tensor: str) -> Extent:
    """All bytes of a checkpoint tensor."""
    info = checkpoint.tensors[tensor]
    return Extent(file=info.file, offset=info.offset, nbytes=info.nbytes)
