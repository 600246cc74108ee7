"""The places of weights in a module tree, and which of them are embedding tables that are read row by row."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layerstream.pipeline.modeling.execution_trace import ExecutionTrace
from layerstream.pipeline.modeling.gathered_table import SMALL_WEIGHT_BYTES
from layerstream.pipeline.modeling.packed_rows import PackedRows
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracing import TracedModel

__all__ = ["WeightPlace", "gathered_places", "places_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlace:
    """The place of a parameter or buffer in the module tree."""

    module: str
    """Path of the module that owns it."""
    name: str
    """Its name there."""

    @property
    def path(self) -> str:
        """Its full name in the tree."""
        return f"{self.module}.{self.name}" if self.module else self.name


def places_of(traced: TracedModel) -> dict[str, list[WeightPlace]]:
    """All places of each recipe's tensor; a module with several paths counts once."""
    aliases = defaultdict(list)
    for name in traced.recipes:
        aliases[name].append(name)
    for alias, name in traced.aliases.items():
        aliases[name].append(alias)
    places: dict[str, list[WeightPlace]] = {}
    for name, paths in aliases.items():
        distinct: dict[tuple[int, str], WeightPlace] = {}
        for path in paths:
            module, _, leaf = path.rpartition(".")
            key = id(traced.module.get_submodule(module)), leaf
            distinct.setdefault(key, WeightPlace(module=module, name=leaf))
        places[name] = list(distinct.values())
    return places


def gathered_places(
    traced: TracedModel,
    places: Mapping[str, Sequence[WeightPlace]],
    traces: Sequence[ExecutionTrace],
    packed: Mapping[str, PackedRows],
) -> dict[str, list[WeightPlace]]:
    """Embedding tables whose rows are stored in files, each with the embeddings that look rows up in it.

    ``packed``: The parameters that are packed, by the names of their recipes.
    """
    used_whole = {use.tensor for trace in traces for use in trace.uses if not use.looks_up}
    gathered = {}
    for name, places_of_table in places.items():
        recipe = traced.recipes[name]
        rows = packed.get(name)
        if len(recipe.shape) != 2 or not (  # noqa: PLR2004
            _has_whole_rows(recipe) if rows is None else rows.is_table
        ):
            continue
        nbytes = torch.Size(recipe.shape).numel() * getattr(torch, recipe.dtype).itemsize
        lookups = [
            place
            for place in places_of_table
            if _looks_rows_up(traced.module.get_submodule(place.module))
            and (place.path not in used_whole or nbytes <= SMALL_WEIGHT_BYTES)
        ]
        if lookups:
            gathered[name] = lookups
    return gathered


def _has_whole_rows(recipe: Recipe) -> bool:
    """Whether no row of a table is cut: it may be in many parts, but not in columns."""
    row_bytes = recipe.shape[1] * getattr(torch, recipe.dtype).itemsize
    pieces = recipe.pieces or ()
    return bool(pieces) and not any(piece.nbytes % row_bytes for piece in pieces)


def _looks_rows_up(module: nn.Module) -> bool:
    # max_norm rewrites the rows that it looks up.
    return isinstance(module, nn.Embedding) and module.max_norm is None
