"""A model's config.json, and the model class that it describes."""

import json
import re
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError

__all__ = ["load_config", "resolve_model_class", "summary_of"]

# transformers makes a module for each, which takes a gigabyte and minutes for 100,000 layers; no model has more.
_MOST_MODULES = 10_000
_COUNTS = re.compile(r"(layers?|blocks?|depths?|experts|stages?|codebooks)$")


def load_config(folder: Path, *, model_class: type[Any] | None = None) -> Any:
    """Read a model's config.json.

    Args:
        folder: The folder of config.json.
        model_class: A class whose own config is wanted, which may be a part of the file's (the text half of CLIP), or
            of a type that transformers does not list; None for the type that the file names.

    Raises:
        ModelError: The file is missing, is not JSON, or describes no model that transformers knows.
    """
    import transformers

    path = folder / "config.json"
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} has no config.json, so there is no telling which model its weights are; "
            "copy it there from where the weights came from."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable as JSON ({error}); fetch it anew.") from error
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    own = getattr(model_class, "config_class", None)  # which an AutoModel does not have
    if own is None and str(model_type) not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{path} is for a model of type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know; upgrade transformers, or pass model_class=."
        )
    _refuse_endless(settings, path)
    try:
        return (own or transformers.AutoConfig).from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{path} does not describe a {model_type} model: {summary_of(error)}."
        ) from error


def _refuse_endless(settings: Any, path: Path) -> None:
    """Refuse numbers of layers that would take the machine's memory before weights are found missing."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if _COUNTS.search(name) and type(value) is int and value > _MOST_MODULES:
                raise ModelError(
                    f"{path} gives {name} as {value:,}, where no model has more than {_MOST_MODULES:,}; fetch it anew."
                )
            _refuse_endless(value, path)


def resolve_model_class(config: Any, model_class: type[Any] | None = None) -> type[Any]:
    """The class of a model: ``model_class``, or the first of the config's architectures.

    Raises:
        ModelError: The config names no architecture or one that transformers does not have, or ``model_class`` is not a
            model class of transformers.
    """
    import transformers

    if model_class is None:
        names = config.architectures or [None]
        name = names[0] if isinstance(names, list | tuple) else names
        model_class = getattr(transformers, str(name), None)
        if model_class is None:
            raise ModelError(
                f"The config.json of this {config.model_type} model names as its architecture "
                f"{name!r:.80}, which transformers {transformers.__version__} does not have; "
                "pass model_class=."
            )
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        raise ModelError(
            f"{getattr(model_class, '__name__', model_class)} is no model class of transformers; "
            "pass one that weights can be loaded into, such as LlamaForCausalLM."
        )
    return model_class


def summary_of(error: Exception) -> str:
    """The message of an exception in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
