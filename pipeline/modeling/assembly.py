"""Prepares a traced model for streaming: which weights are in which layer, which are gathered, and what is bound."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.absent import Absent
from layerstream.pipeline.modeling.adapters import Adapters
from layerstream.pipeline.modeling.binding import Binding, put_buffers
from layerstream.pipeline.modeling.edits import Edits
from layerstream.pipeline.modeling.expert_sources import module_experts
from layerstream.pipeline.modeling.gathered_table import GatheredTable
from layerstream.pipeline.modeling.model_layers import ModelLayer, model_layers
from layerstream.pipeline.modeling.model_uses import trace_uses, with_estimate
from layerstream.pipeline.modeling.own_buffers import written_bytes
from layerstream.pipeline.modeling.packed_banks import group_bytes
from layerstream.pipeline.modeling.packed_experts import PackedParameter
from layerstream.pipeline.modeling.packed_rows import PackedRows, packed_parameters
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.pipeline.modeling.packed_weight import exact_tile_bytes, tile_bytes
from layerstream.pipeline.modeling.table_source import TableSource
from layerstream.pipeline.modeling.tile_trials import exact_tokens
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.modeling.weight_places import WeightPlace, gathered_places, places_of
from layerstream.pipeline.modeling.weight_sources import (
    make_fetch,
    sources_of,
    table_extents,
    table_source,
    unpacking_bytes,
)
from layerstream.pipeline.planning.plan import Plan, Workload
from layerstream.pipeline.planning.planned_layer import PlannedLayer
from layerstream.pipeline.planning.tiles import tile_count
from layerstream.pipeline.planning.workload_memory import WorkloadMemory
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.interruptible import InterruptibleReads

__all__ = ["Assembly", "move_buffers"]


class Assembly:
    """A traced model that is prepared for streaming.

    Args:
        traced: The model.
        checkpoint: Its weight files.
        workload: What to measure the memory of.
        device: The device that will compute; the CPU by default.
        adapters: Those in the traced model.
        experts_on_demand: Leave experts that can be read one by one out of the layers.
        unpacks_by_tiles: Keep packed weights packed, and unpack rows of them when they are used: on a CPU.
        mapped_from_bytes: See ``measure_memory``.
    """

    layers: tuple[ModelLayer, ...]
    """The layers that stream or are resident, without gathered tables."""
    memory: WorkloadMemory | None
    """The memory that ``workload`` takes in addition to the weights: measured in a pass on the meta device, or estimated.

    None without a workload, or if it could not be measured and the config does not tell the model's sizes.
    """
    own_buffer_bytes: int
    """What a request may write to of the model's buffers, which each has of its own; part of ``memory``."""
    written_buffers: frozenset[str]
    """The paths of these buffers, and of smaller ones."""
    tiles: Tiles | None = None
    """What packed weights are unpacked into, once they are bound; the caller of ``bind`` closes them."""

    def __init__(
        self,
        traced: TracedModel,
        checkpoint: Checkpoint,
        workload: Workload | None = None,
        device: torch.device | None = None,
        *,
        adapters: Adapters | None = None,
        experts_on_demand: bool = False,
        unpacks_by_tiles: bool = False,
        mapped_from_bytes: int | None = None,
    ) -> None:
        self.traced = traced
        self.adapters = adapters or Adapters({})
        self.edits = Edits()
        self._checkpoint = checkpoint
        places = places_of(traced)
        self._unpacks_by_tiles = unpacks_by_tiles
        self._tile_count = tile_count(workload.batch_size if workload else 1)
        self._packed = packed_parameters(traced.recipes) if unpacks_by_tiles else {}
        traces, memory = trace_uses(
            traced, self.adapters, workload, device, mapped_from_bytes=mapped_from_bytes
        )
        self.written_buffers = frozenset(path for trace in traces for path in trace.written)
        self.own_buffer_bytes = written_bytes(traced.module, self.written_buffers)
        self.memory = with_estimate(
            memory, traced, checkpoint, workload, own_buffer_bytes=self.own_buffer_bytes
        )
        self._gathered = gathered_places(traced, places, traces, self._packed)
        self._places = {
            name: rest
            for name, where in places.items()
            if (rest := [place for place in where if place not in self._gathered.get(name, ())])
        }
        self._packed_linear = {
            name: dataclasses.replace(rows, exact_tokens=exact_tokens(rows))
            for name, rows in self._packed.items()
            if not rows.transposed and _only_multiplied(traced, self._places.get(name, ()))
        }
        self.layers = model_layers(traced, checkpoint, self._places, traces)
        given = (traced, checkpoint, self._places, self._packed)
        found = module_experts(*given, on_cpu=unpacks_by_tiles) if experts_on_demand else {}
        self._experts = {
            layer.name: [
                each
                for each in found.values()
                if not layer.always_resident and each.parameters <= set(layer.recipes)
            ]
            for layer in self.layers
        }
        experts = chain.from_iterable(self._experts.values())
        self._on_demand = {name for each in experts for name in each.parameters}
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
            tensors=tuple(
                source for recipe in recipes for source in sources_of(recipe, checkpoint)
            ),
            scratch_bytes=sum(
                each.scratch_bytes
                for each in recipes
                if each.pieces is None and each.name not in self._packed_linear
            ),
            tile_bytes=max(self._tile_sizes(layer), default=0)
            if self._unpacks_by_tiles
            else max(map(unpacking_bytes, recipes), default=0),
            exact_tile_bytes=max(self._tile_sizes(layer, exact_tile_bytes), default=0)
            if self._unpacks_by_tiles
            else 0,
            once_bytes=sum(
                self._packed_linear[name].nbytes
                for name in layer.recipes
                if name in self._packed_linear
            ),
            always_resident=layer.always_resident,
            experts=tuple(each.source for each in self._experts[layer.name]),
        )

    def bind(self, plan: Plan, device: torch.device) -> list[Binding]:
        """Put placeholders everywhere, and return a binding for each layer batch."""
        self._put_placeholders_for_experts(device)
        self.tiles = self._make_tiles(plan)
        layers = {layer.name: layer for layer in self.layers}
        bindings = []
        for batch in plan.batches:
            names = [recipe for layer in batch.layers for recipe in layers[layer].recipes]
            binding = Binding(
                self.traced.module,
                device,
                [(self.traced.recipes[name], self._places[name]) for name in names],
                lambda recipe: make_fetch(recipe, self._checkpoint, device),
                packed=self._packed_linear,
                tiles=self.tiles,
                fused_tokens=plan.fused_tokens,
                unpacked=batch.unpacked_bytes > 0,
                edits=self.edits,
            )
            put_buffers(self.traced.module, binding.absent_buffers())
            bindings.append(binding)
        return bindings

    def _tile_sizes(
        self, layer: ModelLayer, size_of: Callable[[PackedRows], int] = tile_bytes
    ) -> list[int]:
        """What all tiles take for each of a layer's packed weights and experts."""
        weights = [
            size_of(self._packed_linear[name])
            for name in layer.recipes
            if name in self._packed_linear
        ]
        weights += [group_bytes(each.packed) for each in self._experts[layer.name]]
        return [self._tile_count * nbytes for nbytes in weights]

    def _make_tiles(self, plan: Plan) -> Tiles | None:
        size_of = tile_bytes if plan.fused_tokens else exact_tile_bytes
        sizes = [self._tile_sizes(layer, size_of) for layer in self.layers]
        nbytes = max([0, *chain.from_iterable(sizes)])
        if not nbytes:
            return None
        return Tiles(
            nbytes=nbytes // self._tile_count,
            count=self._tile_count,
            once_bytes=plan.unpacked_once_bytes,
        )

    @property
    def packed_experts(self) -> dict[str, tuple[PackedParameter, ...]]:
        """Parameters of experts that are packed, by the paths of their modules."""
        return {
            each.source.module: each.packed for found in self._experts.values() for each in found
        }

    def _put_placeholders_for_experts(self, device: torch.device) -> None:
        """Parameters that never come as a whole keep their placeholders."""
        recipes = [(self.traced.recipes[name], self._places[name]) for name in self._on_demand]
        Binding(self.traced.module, device, recipes, lambda _: None, replaceable=False)

    def gather(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        guard: ReadGuard,
        reads: InterruptibleReads,
    ) -> TableSource | None:
        """Put tables that read rows from the files into the embeddings; returns what has the files open, if anything."""
        extents = {
            name: table_extents(self.traced.recipes[name], self._packed.get(name), checkpoint)
            for name in self._gathered
        }
        if not extents:
            return None
        source = table_source(checkpoint, chain.from_iterable(extents.values()), guard, reads)
        for name, places in self._gathered.items():
            recipe, rows = self.traced.recipes[name], self._packed.get(name)
            table = GatheredTable(
                source,
                extents=extents[name],
                shape=recipe.shape,
                dtype=getattr(torch, recipe.dtype),
                device=device,
                packing=None if rows is None else rows.matrices[0].packing,
                is_copied=recipe.scratch_bytes > 0,
            )
            owners = [self.traced.module.get_submodule(place.module) for place in places]
            tables = [
                (owner._parameters, place.name)  # noqa: SLF001
                for owner, place in zip(owners, places, strict=True)
            ]
            self.edits.register(name, tables, table)
            for parameters, leaf in tables:
                parameters[leaf] = table
        return source

    def batch_of_module(self, plan: Plan) -> dict[str, int]:
        """The index of the layer batch that each module needs, by its path; without batches that are always bound."""
        index_of = {name: batch.index for batch in plan.batches for name in batch.layers}
        return {
            path: index_of[layer.name]
            for layer in self.layers
            if not layer.always_resident
            for path in layer.modules
        }


def _only_multiplied(traced: TracedModel, places: Sequence[WeightPlace]) -> bool:
    """Whether linear layers alone use a weight."""
    modules = [traced.module.get_submodule(place.module) for place in places]
    return bool(modules) and all(isinstance(module, nn.Linear) for module in modules)


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
