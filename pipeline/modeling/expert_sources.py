"""Which modules of a model can compute with experts that are read one by one, and where each expert's bytes are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.expert_banks import summed_in_place
from layerstream.pipeline.modeling.packed_experts import (
    PackedParameter,
    are_multiplied_packed,
    packed_parameter,
)
from layerstream.pipeline.modeling.packed_rows import PackedRows
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.modeling.weight_places import WeightPlace
from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor
from layerstream.stages.batch import Extent

__all__ = ["EXACT_IMPLEMENTATIONS", "ModuleExperts", "module_experts"]

# What transformers' decorator for expert modules sets on each of them, and what all of them have.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
# Kernels are chosen by the addresses of matrices modulo this, so experts have to lie as in the whole parameter.
_ALIGNMENT = 64
# Implementations of transformers whose results do not depend on how many experts are computed with at once.
EXACT_IMPLEMENTATIONS = frozenset({None, "eager", "grouped_mm"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleExperts:
    """The experts of one module."""

    source: ExpertSource
    packed: tuple[PackedParameter, ...]
    """The parameters that are unpacked when they are computed with; the others are not packed."""

    @property
    def parameters(self) -> frozenset[str]:
        """The full names of the parameters that hold the experts."""
        names = {tensor.name.partition(":")[0] for tensor in self.source.tensors}
        return frozenset(f"{self.source.module}.{name}" for name in names)


def module_experts(
    traced: TracedModel,
    checkpoint: Checkpoint,
    places: Mapping[str, Sequence[WeightPlace]],
    packed: Mapping[str, PackedRows],
    *,
    on_cpu: bool,
) -> dict[str, ModuleExperts]:
    """The modules whose experts can be read one by one, by their paths.

    They are those of transformers' registry of implementations, with parameters that loading only puts together from runs of
    the files' bytes, or unpacks. Others are streamed whole: who multiplies with all experts at once, and whose parameters
    take other computation.

    Args:
        traced: The model.
        checkpoint: Its weight files.
        places: Of each recipe's tensor.
        packed: The parameters that are packed, by the names of their recipes.
        on_cpu: A CPU computes with them.
    """
    found = {}
    for path, module in traced.module.named_modules():
        if not _has_experts(module):
            continue
        names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        single = all(len(places.get(name, ())) == 1 for name in names)
        if not names or not single:
            continue
        experts = module.num_experts
        tensors: list[ExpertTensor] = []
        parameters: list[PackedParameter] = []
        for name in names:
            recipe = traced.recipes[name]
            if name in packed and recipe.shape[0] == experts:
                leaf = name.rpartition(".")[2]
                made = packed_parameter(leaf, recipe.shape, packed[name], checkpoint)
                if made is None:
                    break
                parameters.append(made[0])
                tensors += made[1]
            elif (tensor := _tensor_of(recipe, experts, checkpoint)) is not None:
                tensors.append(tensor)
            else:
                break
        else:
            source = ExpertSource(
                module=path,
                experts=experts,
                per_token=_per_token(module),
                tensors=tuple(tensors),
                is_multiplied_packed=are_multiplied_packed(module, parameters, tensors),
            )
            found[path] = ModuleExperts(source=source, packed=tuple(parameters))
            if on_cpu:
                _load_products(module, [traced.recipes[name] for name in names])
    return found


def _has_experts(module: Any) -> bool:
    """Whether ``module`` is decorated as a mixture's, and computes with an implementation that is exact here."""
    if not all(hasattr(module, mark) for mark in _MARKS):
        return False
    implementation = getattr(module.config, "_experts_implementation", None)
    return hasattr(type(module).forward, "__wrapped__") and implementation in EXACT_IMPLEMENTATIONS


def _load_products(module: Any, recipes: Sequence[Recipe]) -> None:
    """Load what will multiply with the matrices of ``module``: before memory is planned, so that this counts as loaded."""
    if not module.is_transposed:
        for recipe in recipes:
            summed_in_place(getattr(torch, recipe.dtype), recipe.shape[1:])


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
