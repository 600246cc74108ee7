"""A model's module tree -> the layers that stream, and the modules that need them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import Layer, LayerKind, group_layers, joined
from layerstream.pipeline.modeling.execution_trace import ExecutionTrace, ModuleCall
from layerstream.pipeline.modeling.gathered_table import WHOLE_BYTES
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.stages.errors import ModelError

__all__ = ["ModelLayer", "Use", "gathered_uses", "model_layers", "uses_of"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """The place of a parameter or buffer in the module tree."""

    module: str
    """Path of the module that owns it."""
    name: str
    """Its name there."""

    @property
    def path(self) -> str:
        """Its full name in the tree."""
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayer:
    """Parameters and buffers that are needed together, and the modules whose calls need them."""

    name: str
    kind: LayerKind
    recipes: tuple[str, ...]
    """Names in TracedModel.recipes."""
    modules: tuple[str, ...]
    """Paths of the modules whose calls need the layer."""
    always_resident: (
        bool  # must be resident: used more than once in a pass, or by no module of its own
    )


def uses_of(traced: TracedModel) -> dict[str, list[Use]]:
    """All places of each recipe's tensor; a module with several paths counts once."""
    names = defaultdict(list)
    for name in traced.recipes:
        names[name].append(name)
    for alias, name in traced.aliases.items():
        names[name].append(alias)
    uses: dict[str, list[Use]] = {}
    for name, aliases in names.items():
        distinct: dict[tuple[int, str], Use] = {}
        for alias in aliases:
            module, _, leaf = alias.rpartition(".")
            key = id(traced.module.get_submodule(module)), leaf
            distinct.setdefault(key, Use(module=module, name=leaf))
        uses[name] = list(distinct.values())
    return uses


def gathered_uses(
    traced: TracedModel, uses: Mapping[str, Sequence[Use]], traces: Sequence[ExecutionTrace]
) -> dict[str, list[Use]]:
    """Embedding tables that are stored in a file unchanged, with the embeddings that look rows up in them."""
    otherwise = {use.tensor for trace in traces for use in trace.uses if not use.looks_up}
    gathered = {}
    for name, places in uses.items():
        recipe = traced.recipes[name]
        if recipe.pieces is None or len(recipe.pieces) != 1 or len(recipe.shape) != 2:  # noqa: PLR2004
            continue
        lookups = [
            use
            for use in places
            if _looks_rows_up(traced.module.get_submodule(use.module))
            and (use.path not in otherwise or recipe.pieces[0].nbytes <= WHOLE_BYTES)
        ]
        if lookups:
            gathered[name] = lookups
    return gathered


def _looks_rows_up(module: nn.Module) -> bool:
    # max_norm rewrites the rows that it looks up.
    return isinstance(module, nn.Embedding) and module.max_norm is None


def model_layers(
    traced: TracedModel,
    checkpoint: Checkpoint,
    uses: Mapping[str, Sequence[Use]],
    traces: Sequence[ExecutionTrace],
) -> tuple[ModelLayer, ...]:
    """Group what streams into layers in execution order.

    Groups come from names. Forward passes on the meta device, if they are possible, show their order, which of them
    are visited more than once, and which weights are used outside the calls of their modules.

    Args:
        traced: The model.
        checkpoint: Its weight files.
        uses: The places of each recipe's tensor that streams; gathered ones left out.
        traces: From ``record``.
    """
    shared = [name for name, places in uses.items() if len(places) > 1]
    single = {places[0].path: name for name, places in uses.items() if len(places) == 1}
    _refuse_writes(traced, traces)
    grouped = _group(traced, checkpoint, single)
    events = traces[0].events if traces else ()
    grouped = _split(traced.module, grouped, traces)
    owner = _owner(grouped)
    pure = _pure_modules(traced.module, owner)
    # Parameters stay resident if no call shows when they are needed: here, those of modules with several layers in them.
    homeless = {path for path in single if pure.get(_parent(path)) != owner[path]}
    homeless |= _strays(traces, owner, pure)
    # Recurrent modules keep a second list of their parameters, which binding would not update.
    homeless |= {
        path
        for path in single
        if isinstance(traced.module.get_submodule(_parent(path)), nn.RNNBase)
    }
    visits = [pure[e.module] for e in events if isinstance(e, ModuleCall) and e.module in pure]
    visits = visits or [layer.name for layer in grouped]
    first: dict[str, int] = {}
    repeated: set[str] = set()
    for number, name in enumerate(visits):
        if name in first and visits[number - 1] != name:
            repeated.add(name)
        first.setdefault(name, number)
    telling = pure.keys() - _covered(traces, pure)
    layers = []
    for layer in _by_first_visit(grouped, first):
        recipes = tuple(single[path] for path in layer.tensors if path not in homeless)
        if recipes:
            layers.append(
                ModelLayer(
                    name=layer.name,
                    kind=layer.kind,
                    recipes=recipes,
                    modules=tuple(
                        path for path in pure if path in telling and pure[path] == layer.name
                    ),
                    always_resident=layer.name in repeated,
                )
            )
    kept = (*shared, *(single[path] for path in sorted(homeless)))
    if kept:
        layers.insert(
            0,
            ModelLayer(
                name="shared", kind=LayerKind.OTHER, recipes=kept, modules=(), always_resident=True
            ),
        )
    return tuple(layers)


def _refuse_writes(traced: TracedModel, traces: Sequence[ExecutionTrace]) -> None:
    for trace in traces:
        for use in trace.uses:
            if use.writes:
                raise ModelError(
                    f"{type(traced.module).__name__} changes {use.tensor} while it computes, and weights that "
                    "stream are read anew each time; load it with transformers' from_pretrained instead."
                )


def _split(
    root: nn.Module, grouped: Sequence[Layer], traces: Sequence[ExecutionTrace]
) -> tuple[Layer, ...]:
    """Split layers whose tensors are used at different times of a pass, with other layers in between."""
    if not traces:
        return tuple(grouped)
    runs = _runs(traces[0], _owner(grouped))
    pieces = {layer.name: _pieces(layer, runs) for layer in grouped}
    before = _strays_of(root, grouped, traces)
    apart = [piece for layer in grouped for piece in pieces[layer.name]]
    names = Counter(piece.name for piece in apart)
    # Do not split off a piece whose weights are used by no module of its own.
    stuck = _strays_of(root, apart, traces) - before
    return tuple(
        piece
        for layer in grouped
        for piece in (
            [layer]
            if stuck.intersection(layer.tensors)
            or any(names[piece.name] > 1 for piece in pieces[layer.name])
            else pieces[layer.name]
        )
    )


def _runs(trace: ExecutionTrace, owner: Mapping[str, str]) -> dict[str, set[int]]:
    """For every tensor, the intervals of the pass, each spent in one layer, in which it is used."""
    runs: defaultdict[str, set[int]] = defaultdict(set)
    run, current = 0, ""
    for use in trace.uses:
        layer = owner.get(use.tensor)
        if layer is None:
            continue
        if layer != current:
            run, current = run + 1, layer
        runs[use.tensor].add(run)
    return runs


def _pieces(layer: Layer, runs: Mapping[str, set[int]]) -> list[Layer]:
    groups: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for path in layer.tensors:
        groups[tuple(sorted(runs.get(path, ())))].append(path)
    if len(groups) == 1:
        return [layer]
    return [
        replace(layer, name=joined(list(dict.fromkeys(map(_parent, paths)))), tensors=tuple(paths))
        for _, paths in sorted(groups.items())
    ]


def _strays_of(
    root: nn.Module, layers: Sequence[Layer], traces: Sequence[ExecutionTrace]
) -> set[str]:
    owner = _owner(layers)
    return _strays(traces, owner, _pure_modules(root, owner))


def _strays(
    traces: Sequence[ExecutionTrace], owner: Mapping[str, str], pure: Mapping[str, str]
) -> set[str]:
    """Tensors that are used while no module that is only in their layer is being called."""
    return {
        use.tensor
        for trace in traces
        for use in trace.uses
        if use.tensor in owner
        and owner[use.tensor] not in {pure.get(module) for module in use.within}
    }


def _covered(traces: Sequence[ExecutionTrace], pure: Mapping[str, str]) -> set[str]:
    """Modules that are only called inside another one of the same layer, whose hook is enough.

    A hook costs ten microseconds a call, and most modules of a block are only called by the block.
    """
    calls = [event for trace in traces for event in trace.events if isinstance(event, ModuleCall)]
    called = {call.module for call in calls if call.module in pure}
    by_themselves = {
        call.module
        for call in calls
        if call.module in pure
        and pure[call.module] not in {pure.get(module) for module in call.within}
    }
    return called - by_themselves


def _owner(layers: Sequence[Layer]) -> dict[str, str]:
    return {path: layer.name for layer in layers for path in layer.tensors}


def _group(
    traced: TracedModel, checkpoint: Checkpoint, single: Mapping[str, str]
) -> tuple[Layer, ...]:
    """The layers of the module tree, by the names of its parameters."""
    tensors = {}
    for path, name in single.items():
        source = checkpoint.tensors[traced.recipes[name].sources[0]]
        tensors[path] = replace(source, name=path)
    return group_layers(
        Checkpoint(path=checkpoint.path, files=checkpoint.files, tensors=tensors, config=None)
    )


def _by_first_visit(layers: Sequence[Layer], first: Mapping[str, int]) -> list[Layer]:
    """``layers`` in the order of first visits; one that was not visited stays behind its predecessor."""
    position, keyed = -1, []
    for layer in layers:
        position = first.get(layer.name, position)
        keyed.append((position, layer))
    return [layer for _, layer in sorted(keyed, key=lambda pair: pair[0])]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _pure_modules(root: nn.Module, owner: Mapping[str, str]) -> dict[str, str]:
    """Modules whose parameters are all in one layer, with that layer. Containers are never called."""
    holds: defaultdict[str, set[str]] = defaultdict(set)
    for path, layer in owner.items():
        parent = _parent(path)
        holds[parent].add(layer)
        while parent:
            parent = _parent(parent)
            holds[parent].add(layer)
    return {
        path: next(iter(layers))
        for path, layers in holds.items()
        if len(layers) == 1 and not isinstance(root.get_submodule(path), _CONTAINERS)
    }
