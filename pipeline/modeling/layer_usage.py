"""When layers and their weights are used in a forward pass, by its traces and the module tree."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from layerstream.pipeline.checkpoint.layers import Layer
from layerstream.pipeline.modeling.execution_trace import ExecutionTrace, ModuleCall

__all__ = [
    "intervals_of",
    "layer_of_modules",
    "layer_of_tensors",
    "modules_to_hook",
    "parent_of",
    "used_outside_layer",
    "visits_of",
]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def layer_of_tensors(layers: Sequence[Layer]) -> dict[str, str]:
    """The layer of each tensor, by its path."""
    return {path: layer.name for layer in layers for path in layer.tensors}


def layer_of_modules(root: nn.Module, layer_of_tensor: Mapping[str, str]) -> dict[str, str]:
    """The layer of each module whose weights are all in one layer. Containers are left out: they are never called."""
    layers_in: defaultdict[str, set[str]] = defaultdict(set)
    for path, layer in layer_of_tensor.items():
        for module in _ancestors(path):
            layers_in[module].add(layer)
    return {
        path: next(iter(layers))
        for path, layers in layers_in.items()
        if len(layers) == 1 and not isinstance(root.get_submodule(path), _CONTAINERS)
    }


def visits_of(traces: Sequence[ExecutionTrace], layer_of_module: Mapping[str, str]) -> list[str]:
    """The layers whose modules the most complete pass calls, in order; empty without a trace."""
    return [
        layer_of_module[event.module]
        for event in (traces[0].events if traces else ())
        if isinstance(event, ModuleCall) and event.module in layer_of_module
    ]


def intervals_of(trace: ExecutionTrace, layer_of_tensor: Mapping[str, str]) -> dict[str, set[int]]:
    """For every tensor, the intervals of the pass in which it is used; an interval ends when another layer is used."""
    intervals: defaultdict[str, set[int]] = defaultdict(set)
    number, current = 0, ""
    for use in trace.uses:
        layer = layer_of_tensor.get(use.tensor)
        if layer is None:
            continue
        if layer != current:
            number, current = number + 1, layer
        intervals[use.tensor].add(number)
    return intervals


def used_outside_layer(
    traces: Sequence[ExecutionTrace],
    layer_of_tensor: Mapping[str, str],
    layer_of_module: Mapping[str, str],
) -> set[str]:
    """Tensors that are used while no module of their layer alone is being called."""
    return {
        use.tensor
        for trace in traces
        for use in trace.uses
        if use.tensor in layer_of_tensor
        and layer_of_tensor[use.tensor] not in {layer_of_module.get(each) for each in use.within}
    }


def modules_to_hook(
    traces: Sequence[ExecutionTrace], layer_of_module: Mapping[str, str]
) -> set[str]:
    """The modules of a layer that are not only called inside another one of the same layer, whose hook is enough.

    A hook costs ten microseconds a call, and most modules of a block are only called by the block.
    """
    calls = [
        event
        for trace in traces
        for event in trace.events
        if isinstance(event, ModuleCall) and event.module in layer_of_module
    ]
    outermost = {
        call.module
        for call in calls
        if layer_of_module[call.module] not in {layer_of_module.get(each) for each in call.within}
    }
    # Modules that no trace has called get a hook too.
    nested = {call.module for call in calls} - outermost
    return layer_of_module.keys() - nested


def parent_of(path: str) -> str:
    """The path of the module that owns a tensor or module."""
    return path.rpartition(".")[0]


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = parent_of(path)
        yield path
