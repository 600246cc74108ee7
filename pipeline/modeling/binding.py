"""Puts parameters and buffers into the module tree while their layer batch is loaded."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import nn

from layerstream.pipeline.modeling.absent import Absent
from layerstream.pipeline.modeling.edits import Edits, LoadedWeight, Place, streams
from layerstream.pipeline.modeling.packed_rows import PackedRows
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.pipeline.modeling.packed_weight import PackedWeight
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.unpacked_once import KeptUnpacked
from layerstream.pipeline.modeling.weight_places import WeightPlace
from layerstream.stages.compute import Batch
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import LayerstreamError

__all__ = ["Binding", "Bound", "put_buffers", "source_name"]

logger = logging.getLogger(__name__)


def source_name(tensor: str) -> str:
    """The name under which a plan streams a checkpoint tensor that a parameter is computed from."""
    return f"checkpoint:{tensor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where the tensor of one recipe is put, and its placeholder."""

    recipe: Recipe
    tables: tuple[Place, ...]
    """Its places as a parameter."""
    buffers: tuple[WeightPlace, ...]
    """Its places as a buffer, of which each clone has its own."""
    absent: Absent
    packed: PackedRows | None
    """How it is packed, if it stays so while its layer batch is loaded."""
    edits: Edits

    def put(self, parameter: nn.Parameter) -> None:
        """Put ``parameter`` where it streams; what the user has put there stays, and what was removed is gone."""
        for table, name in self.tables:
            if streams(table.get(name)):
                table[name] = parameter
            elif name in table:
                self.edits.found((table, name))

    def changed(self) -> LoadedWeight | None:
        """The weight if it was changed in place, by a hook or behind a pass."""
        for table, name in self.tables:
            loaded = table.get(name)
            if type(loaded) is LoadedWeight and loaded._version and loaded.layerstream_replace:  # noqa: SLF001 - counts writes
                return loaded
        return None


class Binding:
    """What one layer batch puts into the module tree.

    Args:
        root: The module tree.
        device: Where computation runs.
        recipes: Those of the batch, with the places of each.
        make_fetch: Returns a function that reads a recipe's tensor from the files; None if it is large.
        packed: The parameters that stay packed, by the names of their recipes.
        tiles: What those are unpacked into; None if there are none.
        fused_tokens: Up to how many tokens are multiplied with them without unpacking.
        unpacked: Whether the plan keeps packed ones unpacked as well.
        edits: Gets to know what the user has put in place of weights.
        replaceable: Whether the user may replace these weights.
    """

    def __init__(
        self,
        root: nn.Module,
        device: torch.device,
        recipes: Sequence[tuple[Recipe, Sequence[WeightPlace]]],
        make_fetch: Callable[[Recipe], Callable[[], torch.Tensor] | None],
        *,
        packed: Mapping[str, PackedRows] = MappingProxyType({}),
        tiles: Tiles | None = None,
        fused_tokens: int = 0,
        unpacked: bool = False,
        edits: Edits | None = None,
        replaceable: bool = True,
    ) -> None:
        edits = edits or Edits()
        self._targets = []
        self._tiles = tiles
        self._fused_tokens = fused_tokens
        self.kept = KeptUnpacked(is_kept=unpacked)
        for recipe, places in recipes:
            owners = [(root.get_submodule(place.module), place) for place in places]
            owner, first = owners[0]
            meta = getattr(owner, first.name)
            tables = [
                (owner._parameters, place.name)  # noqa: SLF001
                for owner, place in owners
                if place.name in owner._parameters  # noqa: SLF001
            ]
            absent = Absent(meta, device=device, name=recipe.name, fetch=make_fetch(recipe))
            if replaceable and tables:
                edits.register(recipe.name, tables, absent)
            for table, name in tables:
                table[name] = absent
            self._targets.append(
                _Target(
                    recipe=recipe,
                    tables=tuple(tables),
                    buffers=tuple(place for owner, place in owners if place.name in owner._buffers),  # noqa: SLF001
                    absent=absent,
                    packed=packed.get(recipe.name),
                    edits=edits,
                )
            )

    def bind(
        self, tensors: Mapping[str, torch.Tensor], *, shared: bool = False
    ) -> dict[WeightPlace, torch.Tensor]:
        """Put the parameters in place; returns the buffers, which each clone has to put into its own tables.

        ``shared``: Several passes will compute with them, so that packed ones are better unpacked once.
        """
        buffers = {}
        self.kept.begin_sweep()
        if shared and self._tiles is not None:
            self._tiles.once.open()
        # A tensor made in inference mode could not be used where gradients are computed.
        with torch.inference_mode(mode=False):
            for target in self._targets:
                if target.packed is not None:
                    self._put_packed(target, target.packed, tensors)
                    continue
                tensor = _make_tensor(target.recipe, tensors)
                if target.tables:
                    target.put(_as_parameter(tensor, target.absent))
                buffers.update(dict.fromkeys(target.buffers, tensor))
        return buffers

    def _put_packed(
        self, target: _Target, rows: PackedRows, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        parts = {name: tensors[source_name(name)] for name in target.recipe.sources}
        kept = vars(next(iter(parts.values())))
        weight = kept.get("packed")
        if weight is None:  # made once for residents and mapped files
            weight = kept["packed"] = PackedWeight(
                rows,
                # Not the tensors that it is kept with: a cycle would keep the memory until it is collected.
                {name: part.detach() for name, part in parts.items()},
                shape=target.recipe.shape,
                requires_grad=target.absent.requires_grad,
                tiles=self._tiles,
                fused_tokens=self._fused_tokens,
                kept=(self.kept, target.recipe.name),
            )
            weight.layerstream_replace = target.absent.layerstream_replace
        target.put(weight)

    def keep_changes(self) -> None:
        """Make weights that were changed in place resident, as they are now.

        Raises:
            PlanError: The budget does not hold them.
        """
        for target in self._targets:
            if (loaded := target.changed()) is not None:
                loaded.data = loaded.detach().clone()

    def unbind(self) -> list[LoadedWeight]:
        """Put placeholders back; returns what was changed in place since ``keep_changes``."""
        if self._tiles is not None:
            self._tiles.once.close()
        changed = [loaded for target in self._targets if (loaded := target.changed()) is not None]
        for target in self._targets:
            target.put(target.absent)
        return changed

    def absent_buffers(self) -> dict[WeightPlace, torch.Tensor]:
        """Placeholders for a clone's buffers while the batch is not loaded."""
        return {place: target.absent for target in self._targets for place in target.buffers}


def put_buffers(root: nn.Module, buffers: Mapping[WeightPlace, torch.Tensor]) -> None:
    """Put ``buffers`` into the tables of the module tree ``root``; each clone has tables of its own."""
    for place, tensor in buffers.items():
        root.get_submodule(place.module)._buffers[place.name] = tensor  # noqa: SLF001


def _as_parameter(tensor: torch.Tensor, absent: Absent) -> nn.Parameter:
    """The parameter that is a view of ``tensor``: made once, and kept as long as ``tensor``.

    Args:
        tensor: For residents and mapped files, the same object in every sweep.
        absent: Its placeholder. ``requires_grad`` is as transformers sets it: torch chooses convolution kernels by it,
            which changes bits even if no gradient is computed.
    """
    parameter: LoadedWeight | None = vars(tensor).get("parameter")
    if parameter is None:
        # ``data`` has a count of writes of its own, where ``tensor`` shares that of all slots.
        parameter = LoadedWeight(tensor.data, requires_grad=absent.requires_grad)
        parameter.layerstream_replace = absent.layerstream_replace
        vars(tensor)["parameter"] = parameter
    return parameter


def _make_tensor(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if recipe.pieces is not None:
        return tensors[recipe.name]
    return recipe.replay({name: tensors[source_name(name)] for name in recipe.sources})


class Bound:
    """A layer batch that is loaded; the first forward pass that gets it binds it.

    That happens in the thread of the pass, since binding may compute (casts, transposes), and the pass's own stream
    has to wait for the copies.
    """

    def __init__(self, batch: Batch, binding: Binding, device: Device, *, passes: int = 1) -> None:
        """``passes``: How many are in the sweep."""
        self._passes = passes
        self.index = batch.index
        self.layers = batch.layers
        self._batch = batch
        self._binding = binding
        self._device = device
        self._lock = threading.Lock()
        self._bound: tuple[dict[WeightPlace, torch.Tensor], Event] | None = None

    @cached_property
    def memory(self) -> frozenset[int]:
        """Addresses of the memory of its tensors, which later batches use again."""
        return frozenset(
            tensor.untyped_storage().data_ptr() for tensor in self._batch.tensors.values()
        )

    def bind(self) -> Mapping[WeightPlace, torch.Tensor]:
        """Bind, unless it is bound already; returns the buffers."""
        with self._lock:
            tensors = self._batch.tensors  # the calling thread's stream waits for their copy
            if self._bound is None:
                bound = self._binding.bind(tensors, shared=self._passes > 1)
                self._bound = bound, self._device.record()
            buffers, computed = self._bound
            self._device.wait(computed)
            return buffers

    def keep_changes(self) -> None:
        """See ``Binding``. For the pass that holds the batch, in its thread and before it gives it back."""
        with self._lock:
            self._binding.keep_changes()

    def unbind(self) -> None:
        """Put placeholders back; call it when no pass holds the batch any more."""
        with self._lock:
            changed = self._binding.unbind()  # also when binding failed half-way
        for loaded in changed:  # written behind a pass, between its end and this
            try:
                loaded.data = loaded.detach().clone()
                self._device.record().synchronize()
            except (LayerstreamError, torch.OutOfMemoryError) as error:
                # Nobody is there to raise it to.
                logger.warning("a change in place of layer batch %d is lost: %s", self.index, error)
