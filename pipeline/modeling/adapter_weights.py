"""An adapter's tensors -> the parameters that PEFT has made for it, by PEFT's own names and conversions.

PEFT loads tracers in place of the tensors, as transformers does for a model (``tracing``): so an adapter that does not fit
is refused from headers alone, before memory is taken for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from layerstream.pipeline.checkpoint.adapter_folder import AdapterFolder
from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.config import summary_of
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.table_source import FileSpan, TableSource
from layerstream.pipeline.modeling.tracing import tracer_of
from layerstream.pipeline.modeling.weight_sources import extents_of, table_source
from layerstream.stages.batch import Extent
from layerstream.stages.errors import ModelError

__all__ = ["AdapterTensor", "map_tensors"]

_COMPARED_BYTES = 4 << 20
_OTHER_BASE = "it was made for another base model"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTensor:
    """A parameter or buffer of an adapter, and what it is read from."""

    table: dict[str, Any]
    """Of its module."""
    name: str
    """Its name there."""
    recipe: Recipe
    dtype: torch.dtype
    """In which PEFT computes with it."""
    file: Checkpoint

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return torch.Size(self.recipe.shape).numel() * self.dtype.itemsize

    def equals(self, recipe: Recipe, checkpoint: Checkpoint) -> bool:
        """Whether it is the tensor that ``recipe`` makes from ``checkpoint``, byte for byte. Reads both piece by piece."""
        mine, other = _single_run(self.recipe, self.file), _single_run(recipe, checkpoint)
        if mine is None or other is None or self.recipe.dtype != recipe.dtype:
            return False
        pieces = [bytearray(min(_COMPARED_BYTES, mine.nbytes)) for _ in range(2)]
        with (
            table_source(self.file, [mine]) as first,
            table_source(checkpoint, [other]) as second,
        ):
            for start in range(0, mine.nbytes, _COMPARED_BYTES):
                length = min(_COMPARED_BYTES, mine.nbytes - start)
                one, two = (memoryview(piece)[:length] for piece in pieces)
                first.read_into([FileSpan(mine.file, mine.offset + start, one)])
                second.read_into([FileSpan(other.file, other.offset + start, two)])
                if one != two:
                    return False
        return mine.nbytes == other.nbytes

    def load(self) -> None:
        """Read it into its place, on the CPU."""
        parts = {name: _read(self.file, name) for name in self.recipe.sources}
        value = self.recipe.replay(parts).to(self.dtype)
        if isinstance(self.table[self.name], nn.Parameter):
            value = nn.Parameter(value.contiguous(), requires_grad=False)
        self.table[self.name] = value


def _single_run(recipe: Recipe, file: Checkpoint) -> Extent | None:
    """The bytes of a tensor that is stored as it is."""
    extents = extents_of(recipe, file) if recipe.pieces is not None else ()
    return extents[0] if len(extents) == 1 else None


def map_tensors(
    root: nn.Module, adapter: AdapterFolder, key: str, made: Mapping[str, torch.Tensor]
) -> dict[str, AdapterTensor]:
    """What each parameter of an adapter is read from, by its name in the model; and weights of the base, if it has any.

    Args:
        root: The model, into which PEFT has injected the adapter.
        adapter: Its files.
        key: Its name there.
        made: What PEFT has made for it, by the names in the model.

    Raises:
        ModelError: The adapter lacks tensors, or has others, or in other shapes.
    """
    found = _load_tracers(root, adapter, key)
    places = {**dict(root.named_parameters(remove_duplicate=False)), **made}
    if stray := sorted(found.keys() - places.keys()):
        raise _refusal(
            adapter,
            f"its tensor {stray[0]} has no place in {type(root).__name__}: {_OTHER_BASE}",
            "give that one as base=",
        )
    missing = [name for name, tensor in made.items() if tensor.is_meta and name not in found]
    if missing:
        raise _refusal(
            adapter,
            f"it lacks {missing[0]}, which its config promises",
            "download or save it again",
        )
    return {
        name: _tensor(root, adapter, name, places[name], value) for name, value in found.items()
    }


def _tensor(
    root: nn.Module, adapter: AdapterFolder, name: str, place: torch.Tensor, value: torch.Tensor
) -> AdapterTensor:
    if value.shape != place.shape:
        raise _refusal(
            adapter,
            f"its {name} is of shape {tuple(value.shape)}, and {type(root).__name__} takes {tuple(place.shape)}: "
            f"{_OTHER_BASE}",
            "give that one as base=",
        )
    module, _, leaf = name.rpartition(".")
    owner = root.get_submodule(module)
    table: Any = owner._parameters if leaf in owner._parameters else owner._buffers  # noqa: SLF001
    return AdapterTensor(
        table=table,
        name=leaf,
        recipe=Recipe.of(name, value),  # type: ignore[arg-type] # all of them are tracers
        dtype=place.dtype,
        file=adapter.weights,
    )


def _load_tracers(root: nn.Module, adapter: AdapterFolder, key: str) -> dict[str, torch.Tensor]:
    """The tracers of the adapter's tensors by their names in the model, as PEFT loads them."""
    from peft import set_peft_model_state_dict

    loaded: dict[str, torch.Tensor] = {}

    def load_state_dict(state: Mapping[str, torch.Tensor], **_: Any) -> Any:
        loaded.update(state)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    # Of the wrapper that PEFT has around a model; ``root`` has none.
    tracers = {
        name.removeprefix("base_model.model."): tracer_of(info)
        for name, info in adapter.weights.tensors.items()
    }
    # PEFT would copy the values here, and they are only known to be needed.
    vars(root)["load_state_dict"] = load_state_dict
    try:
        set_peft_model_state_dict(root, tracers, adapter_name=key)
    except KeyError as error:
        raise _refusal(
            adapter,
            f"it lacks {error.args[0]}, which its config promises",
            "download or save it again",
        ) from error
    except Exception as error:
        raise _refusal(
            adapter,
            f"PEFT cannot load its tensors ({summary_of(error)})",
            "save it again with PEFT",
        ) from error
    finally:
        del vars(root)["load_state_dict"]
    return loaded


def _read(file: Checkpoint, name: str) -> torch.Tensor:
    info = file.tensors[name]
    tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    if info.nbytes:
        raw_bytes: Any = tensor.view(-1).view(torch.uint8).numpy()
        with TableSource({info.file: file.files[info.file]}) as source:
            source.read_into([FileSpan(info.file, info.offset, memoryview(raw_bytes).cast("B"))])
    return tensor


def _refusal(adapter: AdapterFolder, fault: str, remedy: str) -> ModelError:
    file = adapter.weights.files[0].path
    return ModelError(f"adapter {adapter.name!r} ({file}): {fault}; {remedy}.")
