"""A model's module tree -> the layers that stream, and the modules that need them."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import Layer, LayerKind, group_layers, joined
from layerstream.pipeline.modeling.execution_trace import ExecutionTrace
from layerstream.pipeline.modeling.layer_usage import (
    intervals_of,
    layer_of_modules,
    layer_of_tensors,
    modules_to_hook,
    parent_of,
    used_outside_layer,
    visits_of,
)
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
    grouped = _group(traced, checkpoint, recipe_at)
    grouped = _split(traced.module, grouped, traces)
    layer_of_tensor = layer_of_tensors(grouped)
    layer_of_module = layer_of_modules(traced.module, layer_of_tensor)
    unhooked = _unhooked(traced.module, traces, layer_of_tensor, layer_of_module)
    visits = visits_of(traces, layer_of_module) or [layer.name for layer in grouped]
    first_visits, repeated = _first_visits(visits)
    hooked = modules_to_hook(traces, layer_of_module)
    layers = []
    for layer in _by_first_visit(grouped, first_visits):
        recipes = tuple(recipe_at[path] for path in layer.tensors if path not in unhooked)
        if recipes:
            layers.append(
                ModelLayer(
                    name=layer.name,
                    kind=layer.kind,
                    recipes=recipes,
                    modules=tuple(
                        path
                        for path, name in layer_of_module.items()
                        if name == layer.name and path in hooked
                    ),
                    always_resident=layer.name in repeated,
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


def _unhooked(
    root: nn.Module,
    traces: Sequence[ExecutionTrace],
    layer_of_tensor: Mapping[str, str],
    layer_of_module: Mapping[str, str],
) -> set[str]:
    """Tensors that must be resident, because no call of a module shows when they are needed."""
    unhooked = used_outside_layer(traces, layer_of_tensor, layer_of_module)
    for path, layer in layer_of_tensor.items():
        module = parent_of(path)
        # Recurrent modules keep a second list of their parameters, which binding would not update.
        is_recurrent = isinstance(root.get_submodule(module), nn.RNNBase)
        if is_recurrent or layer_of_module.get(module) != layer:  # with other layers in its module
            unhooked.add(path)
    return unhooked


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


def _split(
    root: nn.Module, grouped: Sequence[Layer], traces: Sequence[ExecutionTrace]
) -> tuple[Layer, ...]:
    """Split layers whose tensors are used at different times of a pass, with other layers in between."""
    if not traces:
        return tuple(grouped)
    intervals = intervals_of(traces[0], layer_of_tensors(grouped))
    parts = {layer.name: _parts(layer, intervals) for layer in grouped}
    all_parts = [part for layer in grouped for part in parts[layer.name]]
    counts = Counter(part.name for part in all_parts)
    # Do not split off a part whose weights are used by no module of its own.
    stray = _used_outside(root, all_parts, traces) - _used_outside(root, grouped, traces)
    return tuple(
        part
        for layer in grouped
        for part in (
            [layer]
            if stray.intersection(layer.tensors)
            or any(counts[part.name] > 1 for part in parts[layer.name])
            else parts[layer.name]
        )
    )


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


def _used_outside(
    root: nn.Module, layers: Sequence[Layer], traces: Sequence[ExecutionTrace]
) -> set[str]:
    layer_of_tensor = layer_of_tensors(layers)
    return used_outside_layer(traces, layer_of_tensor, layer_of_modules(root, layer_of_tensor))


def _first_visits(visits: Sequence[str]) -> tuple[dict[str, int], set[str]]:
    """When each layer is first visited, and the layers that are visited again after another one."""
    first_visits: dict[str, int] = {}
    repeated: set[str] = set()
    for number, name in enumerate(visits):
        if name in first_visits and visits[number - 1] != name:
            repeated.add(name)
        first_visits.setdefault(name, number)
    return first_visits, repeated


def _by_first_visit(layers: Sequence[Layer], first_visits: Mapping[str, int]) -> list[Layer]:
    """``layers`` in the order of first visits; one that was not visited stays behind its predecessor."""
    position, keyed = -1, []
    for layer in layers:
        position = first_visits.get(layer.name, position)
        keyed.append((position, layer))
    return [layer for _, layer in sorted(keyed, key=lambda pair: pair[0])]
