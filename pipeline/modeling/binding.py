"""Puts parameters and buffers into the module tree while their layer batch is loaded."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.model_layers import Use
from layerstream.pipeline.modeling.tracing import Recipe
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

    It has the true shape, dtype and device, since models look at these anywhere. Some also compute with small
    parameters anywhere (the codebooks of audio codecs, tables of relative positions), which are read from their
    files each time. Computing with a large one raises an error, instead of using memory that has another layer now.
    """

    layer: str
    fetch: Callable[[], torch.Tensor] | None

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
        """A placeholder for ``tensor``, a meta tensor, on ``device``; ``fetch`` reads it from the files."""
        absent: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls,
            tensor.shape,
            strides=tensor.stride(),
            dtype=tensor.dtype,
            device=device,
            requires_grad=tensor.requires_grad,
        )
        absent.layer, absent.fetch = name, fetch
        return absent

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Absent({self.layer}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Read the parameter from its file if it is small, else raise; operations on metadata alone are allowed."""
        aten = torch.ops.aten
        if func in {aten.detach.default, aten.alias.default}:
            return args[0]

        def fetched(leaf: Any) -> Any:
            if not isinstance(leaf, cls):
                return leaf
            if leaf.fetch is None or (func._schema.is_mutable and leaf is args[0]):  # noqa: SLF001 - no public way to ask
                raise ModelError(
                    f"{leaf.layer} is used ({func}) while its layer is not loaded: weights stream, and are "
                    "there only while their module runs"
                )
            logger.debug("%s is read anew for %s, outside its layer", leaf.layer, func)
            return leaf.fetch()

        return func(*pytree.tree_map(fetched, args), **pytree.tree_map(fetched, kwargs or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the tensor of one recipe goes, and its placeholder."""

    recipe: Recipe
    tables: tuple[tuple[dict[str, Any], str], ...]
    """Parameter tables, shared by all clones."""
    buffers: tuple[Use, ...]
    """Buffers, of which each clone has its own."""
    absent: Absent


class Binding:
    """What one layer batch puts into the module tree.

    Args:
        root: The module tree.
        device: Where computation runs.
        recipes: Those of the batch, with the places of each.
        fetch: Reads a recipe's tensor from the files; None if it is large.
    """

    def __init__(
        self,
        root: nn.Module,
        device: torch.device,
        recipes: Sequence[tuple[Recipe, Sequence[Use]]],
        fetch: Callable[[Recipe], Callable[[], torch.Tensor] | None],
    ) -> None:
        self._places = []
        for recipe, uses in recipes:
            owners = [(root.get_submodule(use.module), use) for use in uses]
            meta = getattr(*_first(owners))
            self._places.append(
                _Place(
                    recipe=recipe,
                    tables=tuple(
                        (owner._parameters, use.name)  # noqa: SLF001
                        for owner, use in owners
                        if use.name in owner._parameters  # noqa: SLF001
                    ),
                    buffers=tuple(use for owner, use in owners if use.name in owner._buffers),  # noqa: SLF001
                    absent=Absent(meta, device=device, name=recipe.name, fetch=fetch(recipe)),
                )
            )

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> dict[Use, torch.Tensor]:
        """Put parameters in place; returns the buffers, which each clone has to put into its own tables."""
        buffers = {}
        # A tensor made in inference mode could not be used where gradients are computed.
        with torch.inference_mode(mode=False):
            for place in self._places:
                tensor = _realised(place.recipe, tensors)
                if place.tables:
                    parameter = _parameter_of(tensor, requires_grad=place.absent.requires_grad)
                    for table, name in place.tables:
                        table[name] = parameter
                buffers.update(dict.fromkeys(place.buffers, tensor))
        return buffers

    def unbind(self) -> None:
        """Put placeholders back."""
        for place in self._places:
            for table, name in place.tables:
                table[name] = place.absent

    def absent_buffers(self) -> dict[Use, torch.Tensor]:
        """Placeholders for a clone's buffers while the batch is not loaded."""
        return {use: place.absent for place in self._places for use in place.buffers}


def put_buffers(root: nn.Module, buffers: Mapping[Use, torch.Tensor]) -> None:
    """Put ``buffers`` into the tables of the module tree ``root``; each clone has tables of its own."""
    for use, tensor in buffers.items():
        root.get_submodule(use.module)._buffers[use.name] = tensor  # noqa: SLF001


def _first(owners: Sequence[tuple[nn.Module, Use]]) -> tuple[nn.Module, str]:
    owner, use = owners[0]
    return owner, use.name


def _parameter_of(tensor: torch.Tensor, *, requires_grad: bool) -> nn.Parameter:
    """The parameter that is a view of ``tensor``: made once, and kept as long as ``tensor``.

    Args:
        tensor: For residents and mapped files, the same object in every sweep.
        requires_grad: As transformers sets it: torch chooses convolution kernels by it, which changes bits even where
            no gradient is computed.
    """
    known: nn.Parameter | None = vars(tensor).get("parameter")
    if known is None:
        known = nn.Parameter(tensor, requires_grad=requires_grad)
        vars(tensor)["parameter"] = known
    return known


def _realised(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if recipe.pieces is not None:
        return tensors[recipe.name]
    return recipe.replay({name: tensors[source_name(name)] for name in recipe.sources})


class Bound:
    """A layer batch that has arrived; the first forward pass that gets it binds it.

    That happens in the thread of the pass, since binding may compute (casts, transposes), and the pass's own stream
    has to wait for the copies.
    """

    def __init__(self, batch: Batch, binding: Binding, device: Device) -> None:
        self.index = batch.index
        self.layers = batch.layers
        self._batch = batch
        self._binding = binding
        self._device = device
        self._lock = threading.Lock()
        self._bound: tuple[dict[Use, torch.Tensor], Event] | None = None

    @cached_property
    def memory(self) -> frozenset[int]:
        """Addresses of the memory of its tensors, which is used again for later batches."""
        return frozenset(
            tensor.untyped_storage().data_ptr() for tensor in self._batch.tensors.values()
        )

    def bind(self) -> Mapping[Use, torch.Tensor]:
        """Bind, unless it is bound already; returns the buffers."""
        with self._lock:
            tensors = self._batch.tensors  # the calling thread's stream waits for their copy
            if self._bound is None:
                self._bound = self._binding.bind(tensors), self._device.record()
            buffers, computed = self._bound
            self._device.wait(computed)
            return buffers

    def unbind(self) -> None:
        """Put placeholders back. No rider holds the batch any more."""
        with self._lock:
            self._binding.unbind()  # also when binding failed half-way
