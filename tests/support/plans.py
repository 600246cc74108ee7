"""Plans for checkpoints without files, made from the sizes of their layers alone."""

from pathlib import Path

from layerstream.pipeline import Budget, Checkpoint, make_plan
from layerstream.pipeline.checkpoint.formats.format import WeightFile
from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.planned_layer import PlannedLayer, TensorSource
from layerstream.stages.batch import Extent
from support.checkpoints import CPU

__all__ = ["model", "plan_of"]


def model(sizes, *, always_resident=(), fused=(), config=None):
    """A checkpoint and its layers, ``sizes`` in bytes: an embedding, blocks and a head."""
    layers, offset = [], 0
    for i, nbytes in enumerate(sizes):
        half = nbytes // 4 * 2
        extents = (Extent(file=0, offset=offset, nbytes=nbytes),)
        if i in fused:  # its two halves in reverse order
            extents = (
                Extent(file=0, offset=offset + half, nbytes=nbytes - half),
                Extent(file=0, offset=offset, nbytes=half),
            )
        tensor = TensorSource(
            name=f"layer{i}.w", dtype="bfloat16", shape=(nbytes // 2,), extents=extents
        )
        last = i == len(sizes) - 1
        kind = LayerKind.EMBEDDING if i == 0 else LayerKind.HEAD if last else LayerKind.BLOCK
        layers.append(
            PlannedLayer(
                name=f"layer{i}", kind=kind, tensors=(tensor,), always_resident=i in always_resident
            )
        )
        offset += nbytes
    file = WeightFile(name="m.safetensors", path=Path("/nowhere/m.safetensors"), size_bytes=offset)
    checkpoint = Checkpoint(path=Path("/nowhere"), files=(file,), tensors={}, config=config)
    return checkpoint, layers


def plan_of(
    sizes,
    hardware=CPU,
    *,
    host=None,
    vram=None,
    always_resident=(),
    fused=(),
    config=None,
    **arguments,
):
    """A plan for ``model(sizes)``; by default of direct reads on ``CPU``."""
    checkpoint, layers = model(sizes, always_resident=always_resident, fused=fused, config=config)
    budget = Budget(host=host, vram=vram)
    arguments.setdefault("reader", "direct")
    return make_plan(checkpoint, hardware, budget=budget, layers=layers, **arguments)
