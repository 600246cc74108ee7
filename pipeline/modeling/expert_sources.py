"""Which modules of a model can compute with experts that are read one by one, and where each expert's bytes are."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.modeling.weight_places import WeightPlace
from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor
from layerstream.stages.batch import Extent

__all__ = ["EXACT_IMPLEMENTATIONS", "expert_sources", "parameters_of"]

# What transformers' decorator for expert modules sets on each of them, and what all of them have.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
# Kernels are chosen by the addresses of matrices modulo this, so experts have to lie as in the whole parameter.
_ALIGNMENT = 64
# Implementations of transformers whose results do not depend on how many experts are computed with at once.
EXACT_IMPLEMENTATIONS = frozenset({None, "eager", "grouped_mm"})


def expert_sources(
    traced: TracedModel, checkpoint: Checkpoint, places: Mapping[str, Sequence[WeightPlace]]
) -> dict[str, ExpertSource]:
    """The modules whose experts can be read one by one, by their paths.

    They are those of transformers' registry of implementations, with parameters that loading only puts together from runs of
    the files' bytes. Others are streamed whole: who multiplies with all experts at once, and whose parameters take
    computation (transposing, unpacking).
    """
    found = {}
    for path, module in traced.module.named_modules():
        if not all(hasattr(module, mark) for mark in _MARKS):
            continue
        if not hasattr(type(module).forward, "__wrapped__"):  # not decorated
            continue
        if getattr(module.config, "_experts_implementation", None) not in EXACT_IMPLEMENTATIONS:
            continue
        names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        single = all(len(places.get(name, ())) == 1 for name in names)
        if not names or not single:
            continue
        tensors = [
            _tensor_of(traced.recipes[name], module.num_experts, checkpoint) for name in names
        ]
        if all(tensor is not None for tensor in tensors):
            found[path] = ExpertSource(
                module=path,
                experts=module.num_experts,
                per_token=_per_token(module),
                tensors=tuple(tensor for tensor in tensors if tensor is not None),
            )
    return found


def parameters_of(source: ExpertSource) -> frozenset[str]:
    """The full names of the parameters that hold the experts of ``source``."""
    return frozenset(f"{source.module}.{tensor.name}" for tensor in source.tensors)


def _per_token(module: Any) -> int:
    config = module.config
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 0


def _tensor_of(recipe: Recipe, experts: int, checkpoint: Checkpoint) -> ExpertTensor | None:
    """The tensor of ``recipe`` cut into experts; None if that cannot be done with equal bits."""
    if recipe.pieces is None or not recipe.shape or recipe.shape[0] != experts:
        return None
    whole = sum(piece.nbytes for piece in recipe.pieces)
    nbytes = whole // experts
    if not nbytes or (len(recipe.shape) > 2 and nbytes % _ALIGNMENT):  # noqa: PLR2004
        return None
    extents: list[list[Extent]] = [[] for _ in range(experts)]
    for piece in recipe.pieces:
        info = checkpoint.tensors[piece.source]
        at, stop = piece.offset, piece.offset + piece.nbytes
        while at < stop:
            expert = at // nbytes
            end = min(stop, (expert + 1) * nbytes)
            offset = info.offset + piece.source_offset + at - piece.offset
            extents[expert].append(Extent(file=info.file, offset=offset, nbytes=end - at))
            at = end
    sizes = {tuple(extent.nbytes for extent in each) for each in extents}
    if len(sizes) != 1:
        return None
    # 0: transformers computes with it where it lies in the mapped file; anything else has memory of its own.
    shift = extents[0][0].offset % _ALIGNMENT if recipe.scratch_bytes == 0 else 0
    return ExpertTensor(
        name=recipe.name.rpartition(".")[2],
        dtype=recipe.dtype,
        shape=recipe.shape[1:],
        nbytes=nbytes,
        extents=tuple(map(tuple, extents)),
        shift=shift,
    )
