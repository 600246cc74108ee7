"""Which tensors of a checkpoint are converted: the weights of linear layers, as transformers' model uses them."""

import copy
import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo, WeightFile
from layerstream.pipeline.checkpoint.files import natural_order
from layerstream.pipeline.checkpoint.layers import LayerKind, group_layers
from layerstream.pipeline.checkpoint.quantization import quantizations_in, refuse_packed_otherwise
from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.tracing import (
    TracedModel,
    config_of,
    resolve_model_class,
    trace_model,
)
from layerstream.pipeline.modeling.weight_places import places_of
from layerstream.stages.errors import CheckpointError, ModelError
from layerstream.tools.convert.encoding import Encoding

__all__ = ["ChosenWeights", "check_loads", "choose_weights"]

_MATRIX = 2
_ROUTER = re.compile(r"(^|[._])(gate|router)(\.|$)")
_HEAD_OR_TABLE = "an embedding or a head"
_OTHER_FORM = "stored in another form than the model's"
_NOT_LINEAR = "no linear layer's"
_NO_MATRIX = "of more than two dimensions"
_SHARED = "used in several places"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenWeights:
    """What is converted, and what is not."""

    config: Any
    """The model's config, as transformers reads it."""
    model_class: type[Any]
    converted: frozenset[str]
    """Names of tensors."""
    left: Mapping[str, str]
    """Other tensors of two or more dimensions, each with the reason why it stays as it is."""
    unused: tuple[str, ...]
    """Tensors that the model does not use."""
    ignore: tuple[str, ...]
    """The linear layers that are not converted, by their names in the checkpoint and in transformers' model."""


def choose_weights(checkpoint: Checkpoint, encoding: Encoding) -> ChosenWeights:
    """Find the weights of ``checkpoint`` that can be converted. Only headers and configs are read.

    Raises:
        CheckpointError: It is quantised already, or in a format that is not converted.
        ModelError: transformers does not know the model, or it has no weights that can be converted.
    """
    _refuse_source(checkpoint)
    config, _ = config_of(checkpoint)
    model_class = resolve_model_class(config)
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    # In the files' own dtype, so that a weight that is only cast while it loads counts as stored in the model's form.
    dtype = getattr(torch, sizes.most_common(1)[0][0])
    if not dtype.is_floating_point:
        raise CheckpointError(
            f"{checkpoint.path} holds mostly {dtype} numbers, which no model has as plain weights; convert the "
            "checkpoint that it was made from."
        )
    traced = trace_model(checkpoint, config=config, model_class=model_class, dtype=dtype)
    found_reasons = dict(_Search(checkpoint, traced, encoding).reasons())
    converted = frozenset(name for name, reason in found_reasons.items() if reason is None)
    reasons = {name: reason for name, reason in found_reasons.items() if reason is not None}
    if not converted:
        found = "; ".join(f"{count}: {why}" for why, count in Counter(reasons.values()).items())
        advice = _smaller_groups(encoding) if "group size" in found else ""
        raise ModelError(
            f"{checkpoint.path} has no weights of linear layers that can be converted to {encoding.target} "
            f"({found or 'it has no matrices'}); use it as it is{advice}."
        )
    return ChosenWeights(
        config=config,
        model_class=model_class,
        converted=converted,
        left=reasons,
        unused=traced.unused,
        ignore=_ignored(traced, converted, reasons),
    )


def check_loads(
    checkpoint: Checkpoint,
    chosen: ChosenWeights,
    *,
    files: tuple[WeightFile, ...],
    tensors: Mapping[str, TensorInfo],
    quantization: Mapping[str, Any],
) -> None:
    """Have transformers build the model from the converted tensors, before any is written.

    Args:
        checkpoint: What is converted.
        chosen: What of it.
        files: The files that will be written.
        tensors: What they will hold.
        quantization: The quantization_config of the result.

    Raises:
        ModelError: transformers would not load the result.
    """
    config = copy.deepcopy(chosen.config)
    config.quantization_config = dict(quantization)
    result = Checkpoint(
        path=checkpoint.path,
        files=files,
        tensors=tensors,
        config={**(checkpoint.config or {}), "quantization_config": quantization},
    )
    try:
        traced = trace_model(result, config=config, model_class=chosen.model_class)
    except ModelError as error:
        raise ModelError(
            f"transformers would not load the result, so nothing was written: {error}"
        ) from error
    known = {*chosen.unused}
    lost = [
        name for name in traced.unused if name not in known and not name.endswith(".weight_shape")
    ]
    if lost:
        raise ModelError(
            f"transformers would not load {lost[0]!r} of the result ({len(lost)} such tensors), so nothing was "
            f"written; use {checkpoint.path} as it is."
        )


def _refuse_source(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ModelError(
            "Converting needs the package compressed-tensors: install layerstream[hf]."
        )
    if checkpoint.format == "GGUF":
        raise CheckpointError(
            f"{path} is a GGUF file, whose weights are packed already; convert the checkpoint that it was made from."
        )
    refuse_packed_otherwise(checkpoint)
    for settings in quantizations_in(checkpoint.config or {}):
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        raise CheckpointError(
            f"{path} is quantised already, with {method!r} (quantization_config in its config.json); convert the "
            "checkpoint that it was made from."
        )


class _Search:
    """Looks at each tensor of a checkpoint, and at what the model makes of it."""

    def __init__(self, checkpoint: Checkpoint, traced: TracedModel, encoding: Encoding) -> None:
        self._tensors = checkpoint.tensors
        self._path = checkpoint.path
        self._traced = traced
        self._encoding = encoding
        self._places = places_of(traced)
        self._recipes: dict[str, list[Recipe]] = defaultdict(list)
        for recipe in traced.recipes.values():
            for source in recipe.sources:
                self._recipes[source].append(recipe)
        self._outer = {
            name
            for layer in group_layers(checkpoint)
            if layer.kind in {LayerKind.EMBEDDING, LayerKind.HEAD}
            for name in layer.tensors
        }
        self._head = traced.module.get_output_embeddings()

    def reasons(self) -> Iterator[tuple[str, str | None]]:
        """Each tensor of two or more dimensions, and why it is left as it is; None if it is converted."""
        for name, info in self._tensors.items():
            if len(info.logical_shape) >= _MATRIX:
                reason = self._reason(name, info)
                if reason is not None:
                    self._refuse_mixture(info, reason)
                yield name, reason

    def _reason(self, name: str, info: TensorInfo) -> str | None:
        recipes = self._recipes.get(name, [])
        if not recipes:
            return "not used by the model"
        reason = self._reason_by_name(name, len(info.logical_shape))
        if reason is not None or len(recipes) > 1:
            return reason or _SHARED
        if self._is_expert(recipes[0]):
            return self._encoding.obstacle(info.dtype, info.shape[1])
        return self._dense_reason(info, recipes[0])

    def _reason_by_name(self, name: str, dimensions: int) -> str | None:
        if name in self._outer:
            return _HEAD_OR_TABLE
        if _ROUTER.search(name.removesuffix(".weight")):
            return "a router"
        if dimensions > _MATRIX:
            fused = dimensions == _MATRIX + 1 and "expert" in name
            return "experts in one tensor" if fused else _NO_MATRIX
        return None if name.endswith(".weight") else _NOT_LINEAR

    def _dense_reason(self, info: TensorInfo, recipe: Recipe) -> str | None:
        places = self._places[recipe.name]
        modules = [self._traced.module.get_submodule(place.module) for place in places]
        if any(each is self._head or isinstance(each, torch.nn.Embedding) for each in modules):
            return _HEAD_OR_TABLE
        if len(modules) > 1:
            return _SHARED
        # Others, such as the output projection of torch's own attention, are multiplied with elsewhere.
        if type(modules[0]) is not torch.nn.Linear:
            return _NOT_LINEAR
        if recipe.shape != info.shape or not self._is_put_together(recipe):
            return _OTHER_FORM
        return self._encoding.obstacle(info.dtype, info.shape[1])

    def _is_expert(self, recipe: Recipe) -> bool:
        """Whether a parameter stacks the matrices of experts, one behind the other."""
        matrices = all(
            len(self._tensors[source].shape) == _MATRIX and source.endswith(".weight")
            for source in recipe.sources
        )
        stacks = len(recipe.shape) == _MATRIX + 1 and len(recipe.sources) > 1
        return stacks and matrices and self._is_put_together(recipe)

    def _is_put_together(self, recipe: Recipe) -> bool:
        """Whether a parameter consists of whole tensors as they are in the files."""
        return recipe.pieces is not None and all(
            piece.source_offset == 0 and piece.nbytes == self._tensors[piece.source].nbytes
            for piece in recipe.pieces
        )

    def _refuse_mixture(self, info: TensorInfo, reason: str) -> None:
        """Refuse what transformers puts together or splits while it loads, and may do wrongly in a model of packed weights."""
        recipes = self._recipes.get(info.name, [])
        if len(recipes) > 1 or any(len(recipe.sources) > 1 for recipe in recipes):
            raise ModelError(
                f"{self._path}: {info.name!r} of dtype {info.dtype} and shape {list(info.logical_shape)} cannot be converted "
                f"to {self._encoding.target} ({reason}), and transformers would not load it beside weights that are; use the "
                f"checkpoint as it is{_smaller_groups(self._encoding)}."
            )


def _smaller_groups(encoding: Encoding) -> str:
    return ", or give a smaller --group-size, or channel" if encoding.group_size else ""


def _ignored(
    traced: TracedModel, converted: frozenset[str], left: Mapping[str, str]
) -> tuple[str, ...]:
    names = {
        name.removesuffix(".weight")
        for name, reason in left.items()
        if name.endswith(".weight") and reason != _NO_MATRIX
    }
    linear = {
        f"{path}.weight": path
        for path, module in traced.module.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for name, recipe in traced.recipes.items():
        if name in linear and not converted.isdisjoint(recipe.sources):
            del linear[name]
    return tuple(sorted(names | {*linear.values()}, key=natural_order))
