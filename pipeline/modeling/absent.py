"""Placeholders of parameters whose layer batch is not loaded."""

import logging
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.edits import Streams
from layerstream.stages.errors import ModelError

__all__ = ["Absent"]

logger = logging.getLogger(__name__)


class Absent(Streams, nn.Parameter):
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
