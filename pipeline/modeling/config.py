"""A model's config, in config.json or in the metadata of its weights, and the model class that it describes."""

import json
import re
from pathlib import Path
from typing import Any

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.gguf_reading import quick_headers, require_gguf_packages
from layerstream.stages.errors import ModelError

__all__ = ["config_of", "load_config", "resolve_model_class", "summary_of"]


def config_of(checkpoint: Checkpoint, *, model_class: type[Any] | None = None) -> Any:
    """Read the config of a checkpoint, as ``load_config`` does; of a GGUF model, from its own metadata.

    Raises:
        ModelError: There is none, or it describes no model that transformers knows.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if checkpoint.format == "GGUF":
        return _gguf_config(checkpoint)
    return load_config(folder, model_class=model_class)


def _gguf_config(checkpoint: Checkpoint) -> Any:
    import transformers

    require_gguf_packages(checkpoint.path)
    file = checkpoint.files[0].path
    try:
        with quick_headers(checkpoint):
            config = transformers.AutoConfig.from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True
            )
    except Exception as error:
        raise ModelError(
            f"transformers {transformers.__version__} cannot load {file}: {summary_of(error)}."
        ) from error
    if not config.architectures:
        # As AutoModelForCausalLM and AutoModelForSeq2SeqLM choose the class.
        mappings: list[Any] = [
            transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
            transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        ]
        classes = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
        config.architectures = [each.__name__ for each in classes[:1]] or None
    return config


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
                f"The config of this {config.model_type} model names as its architecture "
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
