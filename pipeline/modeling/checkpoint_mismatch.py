"""Refuses checkpoints that do not fit their model, with the reason."""

import re
from collections import defaultdict
from typing import Any

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.stages.errors import ModelError

__all__ = ["refuse_mismatch"]


def refuse_mismatch(
    loading_info: Any,
    checkpoint: Checkpoint,
    model: Any,
    *,
    ignore_sizes: bool,
    initialize_missing: bool,
) -> None:
    """Refuse a checkpoint whose tensors are not those that a model needs.

    Args:
        loading_info: What transformers has found out: missing and mismatched names, and failed conversions.
        checkpoint: The weight files.
        model: The transformers model, before its missing weights are initialised.
        ignore_sizes: Weights that are stored in other shapes may be made new.
        initialize_missing: Weights that are not stored may be made new.

    Raises:
        ModelError: Tensors are missing, have other shapes, or cannot be converted.
    """
    _refuse_conversion_errors(loading_info, checkpoint, model)
    if not ignore_sizes:
        _refuse_shapes(loading_info, checkpoint, model)
    if not initialize_missing:
        _refuse_missing(loading_info, checkpoint, model)


def _refuse_conversion_errors(loading_info: Any, checkpoint: Checkpoint, model: Any) -> None:
    for name, report in loading_info.conversion_errors.items():
        # A traceback, the exception once more, and a line that begins with "Error".
        cause = report.rpartition("\nError")[0].strip().rpartition("\n")[2]
        raise ModelError(
            f"The tensors of {checkpoint.path} for {name} of {type(model).__name__} do not fit "
            f"together ({cause}); check that config.json belongs to these weights."
        )


def _refuse_shapes(loading_info: Any, checkpoint: Checkpoint, model: Any) -> None:
    for name, stored, expected in sorted(loading_info.mismatched_keys):
        shape = tuple(stored)
        candidates = (
            info
            for info in checkpoint.tensors.values()
            if tuple(info.shape) == shape and (info.name.endswith(name) or name.endswith(info.name))
        )
        info = next(candidates, None)
        where = (
            f"in {checkpoint.files[info.file].path} it is {info.name}, "
            if info
            else f"in {checkpoint.path} it is "
        )
        raise ModelError(
            f"{name} of {type(model).__name__} has shape {tuple(expected)}, but {where}{shape}; "
            "check that config.json belongs to these weights "
            f"({len(loading_info.mismatched_keys)} shapes disagree), or pass ignore_mismatched_sizes=True to have such "
            "weights made new."
        )


def _refuse_missing(loading_info: Any, checkpoint: Checkpoint, model: Any) -> None:
    """Refuse missing weights, which transformers would fill with random numbers and a warning."""
    tied_names: defaultdict[str, set[str]] = defaultdict(set)
    for target, source in model.all_tied_weights_keys.items():
        tied_names[source] |= {target, source}
    stored = (names for names in tied_names.values() if names - loading_info.missing_keys)
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or r"(?!)")  # noqa: SLF001
    missing = [
        name
        for name in sorted(loading_info.missing_keys.difference(*stored))
        if not optional.search(name)
        # A module that the model holds twice has been loaded under its other name.
        and not getattr(model.get_parameter_or_buffer(name), "_is_hf_initialized", False)
    ]
    if missing:
        examples = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")  # noqa: PLR2004
        raise ModelError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(model.state_dict())} tensors that "
            f"{type(model).__name__} needs ({examples}); fetch the missing files, or pass a "
            "model_class= that these weights are for, or initialize_missing=True to have them made new, at random, as "
            "from_pretrained does."
        )
