"""A model's module tree -> the layers that stream, and the modules that need them."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import Layer, LayerKind, group_layers, joined
from layerstream.pipeline.modeling.execution_trace import ExecutionTrace
from layerstream.pipeline.modeling.layer_usage import LayerUsage, parent_of
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.modeling.weight_places import WeightPlace
from layerstream.stages.errors import ModelError

__all__ = ["ModelLayer", "model_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayer:
    """Parameters and buffers that are needed together, and the modules whose calls need them."""

    name: str
    kind: LayerKind
    recipes: tuple[str, ...]
    """Names in TracedModel.recipes."""
    modules: tuple[str, ...]
    """Paths of the modules whose calls need the layer."""
    always_resident: bool
    """Whether it must be resident: it is used more than once in a pass, or by no module of its own."""


def model_layers(
    traced: TracedModel,
    checkpoint: Checkpoint,
    places: Mapping[str, Sequence[WeightPlace]],
    traces: Sequence[ExecutionTrace],
) -> tuple[ModelLayer, ...]:
    """Group the weights that stream into layers, in execution order.

    Groups come from names. Traces, if there are any, show their order, which of them are visited more than once, and
    which weights are used outside the calls of their modules.

    Args:
        traced: The model.
        checkpoint: Its weight files.
        places: The places of each recipe's tensor that streams; without those of gathered tables.
        traces: From ``trace_execution``.

    Raises:
        ModelError: The model changes its weights while it computes.
    """
    _refuse_writes(traced, traces)
    shared = [name for name, where in places.items() if len(where) > 1]
    recipe_at = {where[0].path: name for name, where in places.items() if len(where) == 1}
    grouped = LayerUsage(traced.module, _group(traced, checkpoint, recipe_at), traces)
    usage = grouped.with_layers(_split(grouped))
    # No call of a module shows when these are needed.
    unhooked = {
        path
        for path, weight in usage.weights.items()
        if usage.is_used_outside(weight)
        or usage.shares_module(weight)
        or usage.is_recurrent(weight)
    }
    visits = usage.visits()
    visit_counts = Counter(name for name, _ in groupby(visits))
    hooked = usage.modules_to_hook()
    layers = []
    for layer in _by_first_visit(usage.layers, visits):
        recipes = tuple(recipe_at[path] for path in layer.tensors if path not in unhooked)
        if recipes:
            layers.append(
                ModelLayer(
                    name=layer.name,
                    kind=layer.kind,
                    recipes=recipes,
                    modules=tuple(hooked[layer.name]),
                    always_resident=visit_counts[layer.name] > 1,
                )
            )
    resident = (*shared, *(recipe_at[path] for path in sorted(unhooked)))
    if resident:
        layers.insert(0, _shared_layer(resident, taken={layer.name for layer in layers}))
    return tuple(layers)


def _refuse_writes(traced: TracedModel, traces: Sequence[ExecutionTrace]) -> None:
    for trace in traces:
        for use in trace.uses:
            if use.writes:
                raise ModelError(
                    f"{type(traced.module).__name__} changes {use.tensor} while it computes, and weights that "
                    "stream are read anew each time; load it with transformers' from_pretrained instead."
                )


def _shared_layer(recipes: tuple[str, ...], *, taken: Collection[str]) -> ModelLayer:
    """The layer of weights that belong to no other one. A module may be called ``shared``, too: names are distinct."""
    name = "shared"
    while name in taken:
        name += "_"
    return ModelLayer(
        name=name, kind=LayerKind.OTHER, recipes=recipes, modules=(), always_resident=True
    )


def _group(
    traced: TracedModel, checkpoint: Checkpoint, recipe_at: Mapping[str, str]
) -> tuple[Layer, ...]:
    """The layers of the module tree, by the names of its parameters."""
    tensors = {}
    for path, name in recipe_at.items():
        source = checkpoint.tensors[traced.recipes[name].sources[0]]
        tensors[path] = source._replace(name=path)
    return group_layers(
        Checkpoint(path=checkpoint.path, files=checkpoint.files, tensors=tensors, config=None)
    )


def _split(usage: LayerUsage) -> list[Layer]:
    """Split layers whose tensors are used at different times of a pass, with other layers in between."""
    intervals = usage.intervals()
    parts = {layer.name: _parts(layer, intervals) for layer in usage.layers}
    all_parts = [part for layer in usage.layers for part in parts[layer.name]]
    counts = Counter(part.name for part in all_parts)
    # Do not split off a part whose weights are used by no module of its own.
    stray = _used_outside(usage.with_layers(all_parts)) - _used_outside(usage)
    return [
        part
        for layer in usage.layers
        for part in (
            [layer]
            if stray.intersection(layer.tensors)
            or any(counts[part.name] > 1 for part in parts[layer.name])
            else parts[layer.name]
        )
    ]


def _used_outside(usage: LayerUsage) -> set[str]:
    return {path for path, weight in usage.weights.items() if usage.is_used_outside(weight)}


def _parts(layer: Layer, intervals: Mapping[str, set[int]]) -> list[Layer]:
    """``layer`` by the intervals in which its tensors are used."""
    groups: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for path in layer.tensors:
        groups[tuple(sorted(intervals.get(path, ())))].append(path)
    if len(groups) == 1:
        return [layer]
    return [
        replace(
            layer, name=joined(list(dict.fromkeys(map(parent_of, paths)))), tensors=tuple(paths)
        )
        for _, paths in sorted(groups.items())
    ]


def _by_first_visit(layers: Sequence[Layer], visits: Sequence[str]) -> list[Layer]:
    """``layers`` in the order of first visits; one that was not visited stays behind its predecessor."""
    first_visits = {name: number for number, name in reversed(list(enumerate(visits)))}
    position, keyed = -1, []
    for layer in layers:
        position = first_visits.get(layer.name, position)
        keyed.append((position, layer))
    return [layer for _, layer in sorted(keyed, key=lambda pair: pair[0])]
