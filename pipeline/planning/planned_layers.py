"""The layers of a checkpoint for the planner, by the names of its tensors alone."""

import re
from collections.abc import Sequence

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import Layer, LayerKind
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.planning.expert_names import split_experts
from layerstream.pipeline.planning.expert_source import ExpertSource
from layerstream.pipeline.planning.planned_layer import PlannedLayer, TensorSource
from layerstream.pipeline.planning.tiles import tile_bytes, tile_count
from layerstream.stages.batch import Extent

__all__ = ["planned_layers"]

# Names of embedding tables, whose rows are looked up; and of those in blocks, as of n-grams, which may be in many parts.
_TABLE = re.compile("emb|wte|wpe|shared")
_TABLE_IN_BLOCK = re.compile(r"emb[^.]*(\.[a-z]+_?[0-9]+)?\.weight$")
_LEAST_ROWS_PER_COLUMN = 64
_MATRIX_DIMENSIONS = 2


def planned_layers(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    *,
    gathers_tables: bool = False,
    experts_on_demand: bool = False,
    packed_experts: bool = True,
    sequences: int = 1,
) -> tuple[PlannedLayer, ...]:
    """``layers`` with the files, offsets, dtypes and shapes of their tensors.

    Args:
        checkpoint: Where the tensors are.
        layers: In execution order.
        gathers_tables: Leave out embedding tables, whose rows a ``StreamedModel`` reads from the files when they are
            looked up. A table that is also the head's matrix stays in the head.
        experts_on_demand: Leave experts out of what every pass needs, as a ``StreamedModel`` does.
        packed_experts: Packed ones, too, as it does on a CPU.
        sequences: How many requests compute at the same time.
    """

    def is_streamed(layer: Layer, name: str) -> bool:
        shape = checkpoint.tensors[name].shape
        if not gathers_tables or len(shape) != _MATRIX_DIMENSIONS:
            return True
        if layer.kind is LayerKind.EMBEDDING:
            return not _TABLE.search(name)
        is_table = shape[0] >= _LEAST_ROWS_PER_COLUMN * shape[1]
        return not (layer.kind is LayerKind.BLOCK and is_table and _TABLE_IN_BLOCK.search(name))

    def source(name: str) -> TensorSource:
        info = checkpoint.tensors[name]
        extent = Extent(file=info.file, offset=info.offset, nbytes=info.nbytes)
        return TensorSource(
            name=name,
            dtype=info.dtype,
            shape=info.shape,
            extents=(extent,),
            packed=packed_form(checkpoint, info),
        )

    planned = []
    for layer in layers:
        names: Sequence[str] = [name for name in layer.tensors if is_streamed(layer, name)]
        experts: tuple[ExpertSource, ...] = ()
        if experts_on_demand:
            names, experts = split_experts(checkpoint, names, packed=packed_experts)
        planned.append(_planned(layer, tuple(map(source, names)), experts, sequences))
    return tuple(layer for layer in planned if layer.tensors)


def _planned(
    layer: Layer,
    tensors: tuple[TensorSource, ...],
    experts: tuple[ExpertSource, ...],
    sequences: int,
) -> PlannedLayer:
    packed = [
        (tensor.shape, tensor.packed.plain_bytes)
        for tensor in tensors
        if tensor.packed is not None and tensor.shape
    ]
    return PlannedLayer(
        name=layer.name,
        kind=layer.kind,
        tensors=tensors,
        tile_bytes=tile_count(sequences)
        * max((tile_bytes(shape[0], plain_bytes) for shape, plain_bytes in packed), default=0),
        # Modules that are no linear layers have no matrices, or few.
        once_bytes=sum(nbytes for shape, nbytes in packed if len(shape) == _MATRIX_DIMENSIONS),
        experts=experts,
    )
