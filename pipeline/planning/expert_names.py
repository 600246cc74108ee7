"""Experts from the names of tensors alone, for plans that are made without transformers. Pure."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor
from layerstream.pipeline.planning.model_shape import shape_of
from layerstream.stages.batch import Extent

__all__ = ["split_experts"]

# One tensor per expert, or one for all of them whose first dimension counts experts (the second is GGUF's name).
_SEPARATE = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_STACKED = re.compile(r"(.+\.experts)\.(\w+)|(.+)\.(ffn_\w+_exps\.\w+)")

# Path of the module -> name of the tensor in it -> number of the expert -> tensor.
_Modules = dict[str, dict[str, dict[int, TensorInfo]]]


def split_experts(
    checkpoint: Checkpoint, names: Sequence[str], *, packed: bool = True
) -> tuple[tuple[str, ...], tuple[ExpertSource, ...]]:
    """The tensors of a layer that every token needs, and the experts among ``names`` that can be read one by one.

    ``packed``: Packed experts can.
    """
    shape = shape_of(checkpoint.config)
    if shape is None or not shape.experts:
        return tuple(names), ()
    found: _Modules = defaultdict(lambda: defaultdict(dict))
    for name in names:
        if ".experts." not in name and "_exps." not in name:
            continue
        info = checkpoint.tensors[name]
        if match := _SEPARATE.fullmatch(name):
            found[match[1]][match[3]][int(match[2])] = info
        elif (match := _STACKED.fullmatch(name)) and info.shape[:1] == (shape.experts,):
            module, tensor = (part for part in match.groups() if part)
            found[module][tensor] = dict.fromkeys(range(shape.experts), info)
    sources, taken = [], set()
    for module, tensors in found.items():
        if not all(_are_alike(infos, shape.experts) for infos in tensors.values()):
            continue
        found_tensors = tuple(_tensor(checkpoint, infos) for infos in tensors.values())
        if not packed and any(tensor.packed for tensor in found_tensors):
            continue
        sources.append(
            ExpertSource(
                module=module,
                experts=shape.experts,
                per_token=shape.experts_per_token,
                tensors=found_tensors,
            )
        )
        taken |= {info.name for infos in tensors.values() for info in infos.values()}
    return tuple(name for name in names if name not in taken), tuple(sources)


def _are_alike(infos: Mapping[int, TensorInfo], experts: int) -> bool:
    """Whether each of ``experts`` has one, all of equal dtype and shape."""
    numbers_match = len(infos) == experts and max(infos) == experts - 1
    return numbers_match and len({(info.dtype, info.shape) for info in infos.values()}) == 1


def _tensor(checkpoint: Checkpoint, infos: Mapping[int, TensorInfo]) -> ExpertTensor:
    """The tensor that each expert has in ``infos``, by number: one of its own, or a part of one for all."""
    experts, first = len(infos), infos[0]
    stacked = experts > 1 and first is infos[1]
    nbytes = first.nbytes // experts if stacked else first.nbytes
    packed = packed_form(checkpoint, first)
    if packed is not None and stacked:
        packed = packed._replace(plain_bytes=packed.plain_bytes // experts)
    # The files may hold the experts in any order; the router counts them.
    extents = (
        Extent(
            file=infos[expert].file,
            offset=infos[expert].offset + (expert * nbytes if stacked else 0),
            nbytes=nbytes,
        )
        for expert in range(experts)
    )
    return ExpertTensor(
        name=first.name,
        dtype=first.dtype,
        shape=first.shape[1:] if stacked else first.shape,
        nbytes=nbytes,
        extents=tuple((extent,) for extent in extents),
        packed=packed,
    )
