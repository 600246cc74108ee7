"""When layers and their weights are used in a forward pass, by its traces and the module tree."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

from torch import nn

from layerstream.pipeline.checkpoint.layers import Layer
from layerstream.pipeline.modeling.execution_trace import ExecutionTrace, ModuleCall, WeightUse

__all__ = ["LayerUsage", "Weight", "parent_of"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Weight(NamedTuple):
    """A weight that streams."""

    layer: str
    """The name of its layer."""
    module: str
    """The path of the module that owns it."""
    uses: list[WeightUse]
    """Its uses in all traces."""


class LayerUsage:
    """What traces show of the use of layers.

    Args:
        root: The module tree.
        layers: All that stream.
        traces: The most complete one first; may be empty.

    Attributes:
        weights: The weights of the layers, by their paths.
    """

    def __init__(
        self, root: nn.Module, layers: Sequence[Layer], traces: Sequence[ExecutionTrace]
    ) -> None:
        self.layers = layers
        self._root = root
        self._traces = traces
        uses: defaultdict[str, list[WeightUse]] = defaultdict(list)
        for trace in traces:
            for use in trace.uses:
                uses[use.tensor].append(use)
        self.weights = {
            path: Weight(layer.name, parent_of(path), uses[path])
            for layer in layers
            for path in layer.tensors
        }
        self._layer_of_module = self._find_modules()

    def with_layers(self, layers: Sequence[Layer]) -> Self:
        """The same for other layers."""
        return type(self)(self._root, layers, self._traces)

    def _find_modules(self) -> dict[str, str]:
        """The layer of each module whose weights are all in one layer, without containers, which are never called."""
        layers_in: defaultdict[str, set[str]] = defaultdict(set)
        for path, weight in self.weights.items():
            for module in _ancestors(path):
                layers_in[module].add(weight.layer)
        return {
            path: next(iter(layers))
            for path, layers in layers_in.items()
            if len(layers) == 1 and not isinstance(self._root.get_submodule(path), _CONTAINERS)
        }

    # -- of weights ------------------------------------------------------------------------------

    def is_used_outside(self, weight: Weight) -> bool:
        """Whether it is used while no module of its layer alone is being called."""
        return any(not self._is_within(use.within, weight.layer) for use in weight.uses)

    def shares_module(self, weight: Weight) -> bool:
        """Whether other layers have weights in its module, too."""
        return self._layer_of_module.get(weight.module) != weight.layer

    def is_recurrent(self, weight: Weight) -> bool:
        """Whether its module keeps a second list of its parameters, which binding would not update."""
        return isinstance(self._root.get_submodule(weight.module), nn.RNNBase)

    def _is_within(self, modules: Sequence[str], layer: str) -> bool:
        return any(self._layer_of_module.get(module) == layer for module in modules)

    def intervals(self) -> dict[str, set[int]]:
        """For every weight, the intervals of the most complete pass in which it is used.

        An interval ends when another layer is used.
        """
        intervals: defaultdict[str, set[int]] = defaultdict(set)
        number, current = 0, ""
        for use in self._traces[0].uses if self._traces else ():
            weight = self.weights.get(use.tensor)
            if weight is None:
                continue
            if weight.layer != current:
                number, current = number + 1, weight.layer
            intervals[use.tensor].add(number)
        return intervals

    # -- of layers -------------------------------------------------------------------------------

    def visits(self) -> list[str]:
        """The layers whose modules the most complete pass calls, in order; all by their names without a trace."""
        calls = self._calls(self._traces[:1])
        return [self._layer_of_module[call.module] for call in calls] or [
            layer.name for layer in self.layers
        ]

    def modules_to_hook(self) -> dict[str, list[str]]:
        """The modules of each layer that are not only called inside another one of it, whose hook is enough.

        A hook costs ten microseconds a call, and most modules of a block are only called by the block.
        """
        calls = self._calls(self._traces)
        outermost = {
            call.module
            for call in calls
            if not self._is_within(call.within, self._layer_of_module[call.module])
        }
        # Modules that no trace has called get a hook too.
        nested = {call.module for call in calls} - outermost
        hooked: dict[str, list[str]] = {layer.name: [] for layer in self.layers}
        for path, layer in self._layer_of_module.items():
            if path not in nested:
                hooked[layer].append(path)
        return hooked

    def _calls(self, traces: Sequence[ExecutionTrace]) -> list[ModuleCall]:
        """The calls of modules with weights of one layer."""
        return [
            event
            for trace in traces
            for event in trace.events
            if isinstance(event, ModuleCall) and event.module in self._layer_of_module
        ]


def parent_of(path: str) -> str:
    """The path of the module that owns a tensor or module."""
    return path.rpartition(".")[0]


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = parent_of(path)
        yield path
