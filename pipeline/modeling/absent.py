"""Placeholders of parameters whose layer batch is not loaded."""

import logging
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from layerstream.pipeline.modeling.edits import Streams
from layerstream.pipeline.modeling.wrapper_tensor import WrapperTensor
from layerstream.stages.errors import ModelError

__all__ = ["Absent"]

logger = logging.getLogger(__name__)


class Absent(Streams, WrapperTensor, nn.Parameter):
    """The placeholder of a parameter whose layer batch is not loaded.

    It has the true shape, dtype and device, since models read these at any time. Some also compute with small
    parameters at any time (the codebooks of audio codecs, tables of relative positions), which are read from their
    files each time. Computing with a large one raises an error, instead of using memory that holds another layer by then.
    """

    recipe: str
    """The name of its recipe."""
    fetch: Callable[[], torch.Tensor] | None
    """Reads the parameter from its files; None for a large one."""

    protects_parts = True

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
        absent = cls.without_memory(
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

    def plain(self, func: Any, *, is_written: bool) -> torch.Tensor:
        """Read the parameter from its file if it is small, else raise."""
        if is_written:
            raise ModelError(
                f"{self.recipe} streams, so it cannot be changed in place ({func}): assign a tensor to its data, which makes it "
                "resident, or load the model with transformers' from_pretrained"
            )
        if self.fetch is None:
            raise ModelError(
                f"{self.recipe} is used ({func}) while its layer is not loaded: weights stream, and are "
                "there only while their module runs"
            )
        logger.debug("%s is read anew for %s, outside its layer", self.recipe, func)
        return self.fetch()
