"""Experts from the names of tensors alone, for plans that are made without transformers. Pure."""

import re
from collections import defaultdict
from collections.abc import Sequence

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo
from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor
from layerstream.pipeline.planning.model_shape import shape_of
from layerstream.stages.batch import Extent

__all__ = ["split_experts"]

# One tensor per expert, or one for all of them whose first dimension counts experts.
_SEPARATE = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_STACKED = re.compile(r"(.+\.experts)\.(\w+)")


def split_experts(
    checkpoint: Checkpoint, names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[ExpertSource, ...]]:
    """The tensors of a layer that every token needs, and the experts among ``names`` that can be read one by one."""
    shape = shape_of(checkpoint.config)
    if shape is None or not shape.experts:
        return tuple(names), ()
    found: dict[str, dict[str, list[tuple[str, Extent]]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        info = checkpoint.tensors[name]
        if match := _SEPARATE.fullmatch(name):
            extent = Extent(file=info.file, offset=info.offset, nbytes=info.nbytes)
            found[match[1]][match[3]].append((name, extent))
        elif (match := _STACKED.fullmatch(name)) and info.shape[:1] == (shape.experts,):
            each = info.nbytes // shape.experts
            found[match[1]][match[2]] += [
                (name, Extent(file=info.file, offset=info.offset + i * each, nbytes=each))
                for i in range(shape.experts)
            ]
    sources, taken = [], set()
    for module, tensors in found.items():
        made = [
            _tensor(name, parts, checkpoint.tensors[parts[0][0]], shape.experts)
            for name, parts in tensors.items()
            if len(parts) == shape.experts and len({part.nbytes for _, part in parts}) == 1
        ]
        if len(made) < len(tensors):
            continue
        sources.append(
            ExpertSource(
                module=module,
                experts=shape.experts,
                per_token=shape.experts_per_token,
                tensors=tuple(made),
            )
        )
        taken |= {name for parts in tensors.values() for name, _ in parts}
    return tuple(name for name in names if name not in taken), tuple(sources)


def _tensor(
    name: str, parts: Sequence[tuple[str, Extent]], info: TensorInfo, experts: int
) -> ExpertTensor:
    stacked = len({tensor for tensor, _ in parts}) == 1 < experts
    return ExpertTensor(
        name=name,
        dtype=info.dtype,
        shape=info.shape[1:] if stacked else info.shape,
        nbytes=parts[0][1].nbytes,
        extents=tuple((extent,) for _, extent in parts),
    )
