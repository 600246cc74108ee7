"""Puts parameters and buffers into the module tree while their layer batch is loaded."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.packed_rows import PackedRows
from layerstream.pipeline.modeling.packed_weight import PackedWeight, Tiles
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.weight_places import WeightPlace
from layerstream.stages.compute import Batch
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import ModelError

__all__ = ["Absent", "Binding", "Bound", "put_buffers", "source_name"]

logger = logging.getLogger(__name__)


def source_name(tensor: str) -> str:
    """The name under which a plan streams a checkpoint tensor that a parameter is computed from."""
    return f"checkpoint:{tensor}"


class Absent(nn.Parameter):
    """The placeholder of a parameter whose layer batch is not loaded.

    It has the true shape, dtype and device, since models read these at any time. Some also compute with small
    parameters at any time (the codebooks of audio codecs, tables of relative positions), which are read from their
    files each time. Computing with a large one raises an error, instead of using memory that holds another layer by then.
    """

    recipe: str
    """The name of its recipe."""
    fetch: Callable[[], torch.Tensor] | None
    """Reads the parameter from its files; None for a large one."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @staticmethod
    def __new__(
        cls: type[Self],
        tensor: torch.Tensor,
        *,
        device: torch.device,
        name: str,
        fetch: Callable[[], torch.Tensor] | None = None,
    ) -> Self:
        """A placeholder on ``device`` for ``tensor``, a meta tensor; ``fetch`` reads it from the files."""
        absent: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls,
            tensor.shape,
            strides=tensor.stride(),
            dtype=tensor.dtype,
            device=device,
            requires_grad=tensor.requires_grad,
        )
        absent.recipe, absent.fetch = name, fetch
        return absent

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Absent({self.recipe}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Read the parameter from its file if it is small, else raise; operations on metadata alone are allowed."""
        aten = torch.ops.aten
        if func in {aten.detach.default, aten.alias.default}:
            return args[0]

        def fetch(leaf: Any) -> Any:
            if not isinstance(leaf, cls):
                return leaf
            is_written = func._schema.is_mutable and leaf is args[0]  # noqa: SLF001 - no public way to ask
            if leaf.fetch is None or is_written:
                raise ModelError(
                    f"{leaf.recipe} is used ({func}) while its layer is not loaded: weights stream, and are "
                    "there only while their module runs"
                )
            logger.debug("%s is read anew for %s, outside its layer", leaf.recipe, func)
            return leaf.fetch()

        return func(*pytree.tree_map(fetch, args), **pytree.tree_map(fetch, kwargs or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where the tensor of one recipe is put, and its placeholder."""

    recipe: Recipe
    tables: tuple[tuple[dict[str, Any], str], ...]
    """Parameter tables, which all clones share, and its name in each."""
    buffers: tuple[WeightPlace, ...]
    """Its places as a buffer, of which each clone has its own."""
    absent: Absent
    packed: PackedRows | None
    """How it is packed, if it stays so while its layer batch is loaded."""


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
    ) -> None:
        self._targets = []
        self._tiles = tiles
        self._fused_tokens = fused_tokens
        for recipe, places in recipes:
            owners = [(root.get_submodule(place.module), place) for place in places]
            owner, first = owners[0]
            meta = getattr(owner, first.name)
            self._targets.append(
                _Target(
                    recipe=recipe,
                    tables=tuple(
                        (owner._parameters, place.name)  # noqa: SLF001
                        for owner, place in owners
                        if place.name in owner._parameters  # noqa: SLF001
                    ),
                    buffers=tuple(place for owner, place in owners if place.name in owner._buffers),  # noqa: SLF001
                    absent=Absent(meta, device=device, name=recipe.name, fetch=make_fetch(recipe)),
                    packed=packed.get(recipe.name),
                )
            )

    def bind(
        self, tensors: Mapping[str, torch.Tensor], *, shared: bool = False
    ) -> dict[WeightPlace, torch.Tensor]:
        """Put the parameters in place; returns the buffers, which each clone has to put into its own tables.

        ``shared``: Several passes will compute with them, so that packed ones are better unpacked once.
        """
        buffers = {}
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
                    parameter = _as_parameter(tensor, requires_grad=target.absent.requires_grad)
                    for table, name in target.tables:
                        table[name] = parameter
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
            )
        for table, name in target.tables:
            table[name] = weight

    def unbind(self) -> None:
        """Put placeholders back."""
        if self._tiles is not None:
            self._tiles.once.close()
        for target in self._targets:
            for table, name in target.tables:
                table[name] = target.absent

    def absent_buffers(self) -> dict[WeightPlace, torch.Tensor]:
        """Placeholders for a clone's buffers while the batch is not loaded."""
        return {place: target.absent for target in self._targets for place in target.buffers}


def put_buffers(root: nn.Module, buffers: Mapping[WeightPlace, torch.Tensor]) -> None:
    """Put ``buffers`` into the tables of the module tree ``root``; each clone has tables of its own."""
    for place, tensor in buffers.items():
        root.get_submodule(place.module)._buffers[place.name] = tensor  # noqa: SLF001


def _as_parameter(tensor: torch.Tensor, *, requires_grad: bool) -> nn.Parameter:
    """The parameter that is a view of ``tensor``: made once, and kept as long as ``tensor``.

    Args:
        tensor: For residents and mapped files, the same object in every sweep.
        requires_grad: As transformers sets it: torch chooses convolution kernels by it, which changes bits even if no
            gradient is computed.
    """
    parameter: nn.Parameter | None = vars(tensor).get("parameter")
    if parameter is None:
        parameter = nn.Parameter(tensor, requires_grad=requires_grad)
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

    def unbind(self) -> None:
        """Put placeholders back; call it when no pass holds the batch any more."""
        with self._lock:
            self._binding.unbind()  # also when binding failed half-way
