"""What ``save_pretrained`` writes for a streamed model: recorded from transformers' own, then copied from file to file.

transformers saves tracers in place of the weights. So names, the checkpoint's original form, ties and shards are those that it
chooses, for every architecture, and each tensor that it would write is a recipe: mostly bytes of the files that are open.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.formats.safetensors_writing import (
    WRITABLE_DTYPES,
    StoredTensor,
)
from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.pipeline.modeling.byte_runs import Run
from layerstream.pipeline.modeling.edits import streams
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.replacing import for_this_thread
from layerstream.pipeline.modeling.tracer_tensor import Tracer
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.modeling.weight_sources import read_weight, reading_bytes
from layerstream.stages.errors import ModelError

__all__ = ["SavedFile", "SavedTensor", "record_save"]

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """A tensor that is written."""

    stored: StoredTensor
    value: torch.Tensor | Recipe
    """Itself, if it is in memory (edited weights, adapters); else how it is made."""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "SavedTensor":
        """What transformers would write ``tensor`` as.

        Raises:
            ModelError: It cannot be written.
        """
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in WRITABLE_DTYPES:
            raise ModelError(f"{name} is of dtype {dtype}, which safetensors cannot hold.")
        return cls(
            stored=StoredTensor(name, dtype, tuple(tensor.shape)),
            value=Recipe.of(name, tensor) if isinstance(tensor, Tracer) else tensor.detach(),
        )

    def needed_bytes(self, checkpoint: Checkpoint) -> int:
        """The most memory that writing it takes."""
        value = self.value
        if isinstance(value, torch.Tensor):
            return 0 if value.device.type == "cpu" and value.is_contiguous() else value.nbytes
        if value.pieces is not None:
            return _BLOCK_BYTES
        return reading_bytes(value, checkpoint)

    def blocks(self, reader: SourceReader) -> Iterator[memoryview]:
        """Its bytes, some at a time."""
        if isinstance(self.value, torch.Tensor):
            yield _bytes_of(self.value)
        elif self.value.pieces is None:
            yield _bytes_of(read_weight(self.value, reader))
        else:
            for piece in self.value.pieces:
                info = reader.checkpoint.tensors[piece.source]
                for first in range(0, piece.nbytes, _BLOCK_BYTES):
                    count = min(_BLOCK_BYTES, piece.nbytes - first)
                    yield _bytes_of(reader.read(info, piece.source_offset + first, count))


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """A file of weights that is written."""

    path: Path
    tensors: tuple[SavedTensor, ...]
    metadata: Mapping[str, str]


def record_save(
    clone: Any,
    traced: TracedModel,
    save: Callable[[Mapping[str, torch.Tensor]], None],
    *,
    state: Mapping[str, torch.Tensor] | None = None,
) -> list[SavedFile]:
    """Call ``save`` with the state of a model; returns the files of weights that it would have written. It writes the others.

    Args:
        clone: The model; no other thread may use it.
        traced: How its weights are made.
        save: transformers' ``save_pretrained`` of the clone.
        state: What to save, instead of ``clone.state_dict()``.

    Raises:
        ModelError: A weight cannot be saved.
    """
    from transformers import modeling_utils

    given = clone.state_dict(keep_vars=True) if state is None else state
    traced_state = _traced(given, traced)
    found_in_model = clone.get_parameter_or_buffer

    def identity(name: str) -> Any:
        # By which transformers tells tied weights: places of one weight have placeholders of their own.
        return traced_state[name] if name in traced_state else found_in_model(name)

    files: list[SavedFile] = []

    def record(tensors: Mapping[str, Any], path: str, metadata: Mapping[str, str]) -> None:
        saved = tuple(SavedTensor.of(name, tensor) for name, tensor in tensors.items())
        files.append(SavedFile(path=Path(path), tensors=saved, metadata=metadata))

    vars(clone)["get_parameter_or_buffer"] = identity
    with for_this_thread(modeling_utils, "safe_save_file", record):
        save(dict(traced_state))
    return files


def _traced(state: Mapping[str, torch.Tensor], traced: TracedModel) -> dict[str, torch.Tensor]:
    """``state`` with tracers for what streams, one for each weight."""
    tracers: dict[str, Tracer] = {}
    result: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        recipe = traced.recipes.get(traced.aliases.get(name, name))
        if not streams(value):
            result[name] = value
            continue
        if recipe is None:
            raise ModelError(
                f"{name} of state_dict= is a weight that streams under another name; leave state_dict= out, or give it the "
                "names of model.state_dict()."
            )
        if recipe.name not in tracers:
            tracers[recipe.name] = _tracer_of(recipe, value)
        result[name] = tracers[recipe.name]
    return result


def _tracer_of(recipe: Recipe, placeholder: torch.Tensor) -> Tracer:
    """The tracer that ``recipe`` was made from."""
    meta = torch.empty_strided(
        recipe.shape, placeholder.stride(), dtype=getattr(torch, recipe.dtype), device="meta"
    )
    runs = None
    if recipe.pieces is not None:
        runs = tuple(
            Run(piece.source, piece.source_offset, piece.nbytes) for piece in recipe.pieces
        )
    return Tracer(meta, value=recipe.value, runs=runs)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return data
