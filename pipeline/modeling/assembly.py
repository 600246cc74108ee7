"""Prepares a traced model for streaming: which weights are in which layer, which are gathered, and what is bound."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.activation_memory import PromptPass
from layerstream.pipeline.modeling.binding import Absent, Binding, put_buffers, source_name
from layerstream.pipeline.modeling.execution_trace import trace_execution
from layerstream.pipeline.modeling.expert_sources import expert_sources, parameters_of
from layerstream.pipeline.modeling.gathered_table import (
    SMALL_WEIGHT_BYTES,
    GatheredTable,
    TableSource,
    empty_congruent,
)
from layerstream.pipeline.modeling.model_layers import ModelLayer, model_layers
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.modeling.weight_places import gathered_places, places_of
from layerstream.pipeline.planning.layout import PlannedLayer, TensorSource
from layerstream.pipeline.planning.plan import Plan, Workload
from layerstream.pipeline.planning.workload_memory import WorkloadMemory
from layerstream.stages.batch import Extent
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["Assembly", "move_buffers"]


class Assembly:
    """A traced model that is prepared for streaming.

    Args:
        traced: The model.
        checkpoint: Its weight files.
        workload: What to measure the memory of.
        device: The device that will compute; the CPU by default.
        experts_on_demand: Leave experts that can be read one by one out of the layers.
    """

    layers: tuple[ModelLayer, ...]
    """The layers that stream or are resident, without gathered tables."""
    memory: WorkloadMemory | None
    """The memory that ``workload`` takes in addition to the weights, measured in a pass on the meta device.

    None without a workload, or if it could not be measured.
    """

    def __init__(
        self,
        traced: TracedModel,
        checkpoint: Checkpoint,
        workload: Workload | None = None,
        device: torch.device | None = None,
        *,
        experts_on_demand: bool = False,
    ) -> None:
        self.traced = traced
        self._checkpoint = checkpoint
        places = places_of(traced)
        prompt_pass = None if workload is None else PromptPass.of(traced.module, workload, device)
        traces = trace_execution(traced.module, prompt_pass)
        self.memory = prompt_pass.memory() if prompt_pass else None
        self._gathered = gathered_places(traced, places, traces)
        self._places = {
            name: rest
            for name, where in places.items()
            if (rest := [place for place in where if place not in self._gathered.get(name, ())])
        }
        self.layers = model_layers(traced, checkpoint, self._places, traces)
        sources = expert_sources(traced, checkpoint, self._places) if experts_on_demand else {}
        self._experts = {
            layer.name: [
                source
                for source in sources.values()
                if not layer.always_resident and parameters_of(source) <= set(layer.recipes)
            ]
            for layer in self.layers
        }
        self._on_demand = {
            name for found in self._experts.values() for s in found for name in parameters_of(s)
        }
        self.layers = tuple(
            dataclasses.replace(
                layer, recipes=tuple(name for name in layer.recipes if name not in self._on_demand)
            )
            for layer in self.layers
        )

    def planned(self, checkpoint: Checkpoint) -> tuple[PlannedLayer, ...]:
        """The layers for the planner."""
        return tuple(self._planned(layer, checkpoint) for layer in self.layers)

    def _planned(self, layer: ModelLayer, checkpoint: Checkpoint) -> PlannedLayer:
        recipes = [self.traced.recipes[name] for name in layer.recipes]
        return PlannedLayer(
            name=layer.name,
            kind=layer.kind,
            tensors=tuple(source for recipe in recipes for source in _sources(recipe, checkpoint)),
            scratch_bytes=sum(each.scratch_bytes for each in recipes if each.pieces is None),
            always_resident=layer.always_resident,
            experts=tuple(self._experts[layer.name]),
        )

    def bind(self, plan: Plan, device: torch.device) -> list[Binding]:
        """Put placeholders everywhere, and return a binding for each layer batch."""
        self._put_placeholders_for_experts(device)
        layers = {layer.name: layer for layer in self.layers}
        bindings = []
        for batch in plan.batches:
            names = [recipe for layer in batch.layers for recipe in layers[layer].recipes]
            binding = Binding(
                self.traced.module,
                device,
                [(self.traced.recipes[name], self._places[name]) for name in names],
                lambda recipe: _make_fetch(recipe, self._checkpoint, device),
            )
            binding.unbind()
            put_buffers(self.traced.module, binding.absent_buffers())
            bindings.append(binding)
        return bindings

    def _put_placeholders_for_experts(self, device: torch.device) -> None:
        """Parameters that never come as a whole keep their placeholders."""
        recipes = [(self.traced.recipes[name], self._places[name]) for name in self._on_demand]
        Binding(self.traced.module, device, recipes, lambda _: None).unbind()

    def gather(
        self, checkpoint: Checkpoint, device: torch.device, guard: ReadGuard
    ) -> list[TableSource]:
        """Put tables that read rows from the files into the embeddings; returns the open files."""
        files: dict[int, TableSource] = {}
        with ExitStack() as opened:
            for name, places in self._gathered.items():
                recipe = self.traced.recipes[name]
                extent = _extents(recipe, checkpoint)[0]
                if extent.file not in files:
                    path = checkpoint.files[extent.file].path
                    files[extent.file] = opened.enter_context(TableSource(path, guard))
                table = GatheredTable(
                    files[extent.file],
                    offset=extent.offset,
                    shape=recipe.shape,
                    dtype=getattr(torch, recipe.dtype),
                    device=device,
                )
                for place in places:
                    self.traced.module.get_submodule(place.module)._parameters[place.name] = table  # noqa: SLF001
            opened.pop_all()  # the caller closes them from here on
        return list(files.values())

    def batch_of_module(self, plan: Plan) -> dict[str, int]:
        """The index of the layer batch that each module needs, by its path; without batches that are always bound."""
        index_of = {name: batch.index for batch in plan.batches for name in batch.layers}
        return {
            path: index_of[layer.name]
            for layer in self.layers
            if not layer.always_resident
            for path in layer.modules
        }


def _extents(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Extent, ...]:
    """The parts of files that the recipe's tensor consists of."""
    extents = []
    for piece in recipe.pieces or ():
        info = checkpoint.tensors[piece.source]
        offset = info.offset + piece.source_offset
        extents.append(Extent(file=info.file, offset=offset, nbytes=piece.nbytes))
    return tuple(extents) or (Extent(file=0, offset=0, nbytes=0),)


def _make_fetch(
    recipe: Recipe, checkpoint: Checkpoint, device: torch.device
) -> Callable[[], torch.Tensor] | None:
    """A function that reads a small parameter from its files; None for a large one."""
    extents = _extents(recipe, checkpoint)
    if recipe.pieces is None or sum(extent.nbytes for extent in extents) > SMALL_WEIGHT_BYTES:
        return None

    def fetch() -> torch.Tensor:
        offset = 0 if recipe.scratch_bytes else extents[0].offset
        tensor = empty_congruent(recipe.shape, getattr(torch, recipe.dtype), offset)
        raw_bytes: Any = tensor.view(-1).view(torch.uint8).numpy()
        buffer = memoryview(raw_bytes).cast("B")
        begin = 0
        for extent in extents:
            with TableSource(checkpoint.files[extent.file].path) as source:
                source.read_into([(extent.offset, buffer[begin : begin + extent.nbytes])])
            begin += extent.nbytes
        return tensor.to(device)

    return fetch


def _sources(recipe: Recipe, checkpoint: Checkpoint) -> list[TensorSource]:
    """What is read for a recipe: its pieces, or the tensors that it is computed from."""
    if recipe.pieces is not None:
        return [
            TensorSource(
                name=recipe.name,
                dtype=recipe.dtype,
                shape=recipe.shape,
                extents=_extents(recipe, checkpoint),
                copied=recipe.scratch_bytes > 0,
            )
        ]
    infos = [checkpoint.tensors[name] for name in recipe.sources]
    return [
        TensorSource(
            name=source_name(info.name),
            dtype=info.dtype,
            shape=info.shape,
            extents=(Extent(file=info.file, offset=info.offset, nbytes=info.nbytes),),
        )
        for info in infos
    ]


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move buffers that do not stream to the device."""
    for part in module.modules():
        for table in (part._buffers, part._parameters):  # noqa: SLF001
            for name, tensor in table.items():
                if tensor is not None and not isinstance(tensor, (Absent, GatheredTable)):
                    moved: Any = tensor.detach().to(device)
                    if isinstance(tensor, nn.Parameter):
                        moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
                    table[name] = moved
