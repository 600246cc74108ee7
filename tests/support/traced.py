"""Traced models and their recipes, and what their weights have to equal."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracing import (
    TracedModel,
    load_config,
    resolve_model_class,
    trace_model,
)

__all__ = ["Save", "equal_with_strides", "join_pieces", "rewrite", "trace"]

Save = Callable[..., Path]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of a saved model."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return folder


def trace(folder: Path, model: str = "", **kwargs: Any) -> TracedModel:
    """Trace the model in ``folder``, with the class that its config names or ``model``."""
    model_class = getattr(transformers, model) if model else None
    config, _ = load_config(folder, model_class=model_class)
    return trace_model(
        Checkpoint.open(folder),
        config=config,
        model_class=resolve_model_class(config, model_class),
        **kwargs,
    )


def join_pieces(recipe: Recipe, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The parameter that a recipe's pieces make, byte by byte."""
    data = bytearray()
    for piece in recipe.pieces or ():
        assert piece.offset == len(data)
        source = sources[piece.source].reshape(-1).view(torch.uint8).numpy().tobytes()
        data += source[piece.source_offset : piece.source_offset + piece.nbytes]
    raw_bytes = torch.tensor(list(data), dtype=torch.uint8)
    return raw_bytes.view(getattr(torch, recipe.dtype)).reshape(recipe.shape)


def equal_with_strides(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bits, shape and strides."""

    def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
        # A clone: a single element may have any stride, and then cannot be viewed as smaller items.
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        return copy.view(-1).view(torch.uint8)

    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and torch.equal(raw_bytes(one), raw_bytes(other))
    )
