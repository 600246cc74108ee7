"""A model's config, in config.json or in the metadata of its weights, and the model class that it describes."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.gguf_reading import quick_headers, require_gguf_packages
from layerstream.stages.errors import ModelError

__all__ = ["config_of", "load_config", "resolve_model_class", "summary_of", "text_config_of"]


def config_of(
    checkpoint: Checkpoint,
    *,
    model_class: type[Any] | None = None,
    config: Any = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, dict[str, Any]]:
    """Read the config of a checkpoint, as ``load_config`` does; of a GGUF model, from its own metadata.

    Args:
        checkpoint: The weight files.
        model_class: As in ``load_config``.
        config: One to use instead, or the folder or file that it is in.
        settings: Attributes of the config to set.

    Returns:
        The config, and those of ``settings`` that are no attributes of it.

    Raises:
        ModelError: There is none, or it describes no model that transformers knows.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if config is not None and not isinstance(config, str | os.PathLike):
        return config, dict(
            settings
        )  # as transformers takes it: settings are for the model's class then
    if config is not None:
        return load_config(Path(config), model_class=model_class, settings=settings)
    if checkpoint.format == "GGUF":
        return _gguf_config(checkpoint, settings)
    return load_config(folder, model_class=model_class, settings=settings)


def _gguf_config(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    import transformers

    require_gguf_packages(checkpoint.path)
    file = checkpoint.files[0].path
    try:
        with quick_headers(checkpoint):
            config, unused = transformers.AutoConfig.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                local_files_only=True,
                return_unused_kwargs=True,
                **settings,
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
    return config, {name: value for name, value in unused.items() if name in settings}


# transformers makes a module for each, which takes a gigabyte and minutes for 100,000 layers; no model has more.
_MOST_MODULES = 10_000
_ATTENTION = "attn_implementation"
_FLASH_ATTENTION = re.compile(r"(?:paged\|)?flash_attention_(\d+)")
_COUNTS = re.compile(r"(layers?|blocks?|depths?|experts|stages?|codebooks)$")


def load_config(
    folder: Path,
    *,
    model_class: type[Any] | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, dict[str, Any]]:
    """Read a model's config.json.

    Args:
        folder: The folder of config.json, or a file in its place.
        model_class: A class whose own config is wanted, which may be a part of the file's (the text half of CLIP), or
            of a type that transformers does not list; None for the type that the file names.
        settings: Attributes of the config to set.

    Returns:
        The config, and those of ``settings`` that are no attributes of it.

    Raises:
        ModelError: The file is missing, is not JSON, or describes no model that transformers knows.
    """
    import transformers

    path = folder if folder.is_file() else folder / "config.json"
    try:
        written = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} has no config.json, so there is no telling which model its weights are; "
            "copy it there from where the weights came from."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable as JSON ({error}); fetch it anew.") from error
    model_type = written.get("model_type") if isinstance(written, dict) else None
    own = getattr(model_class, "config_class", None)  # which an AutoModel does not have
    if own is None and str(model_type) not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{path} is for a model of type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know; upgrade transformers, or pass model_class=."
        )
    _refuse_code_of_the_hub(written, path, attention=_ATTENTION not in settings)
    _refuse_endless(written, path)
    _refuse_endless(dict(settings), path)
    try:
        config, unused = (own or transformers.AutoConfig).from_pretrained(
            folder, local_files_only=True, return_unused_kwargs=True, **settings
        )
        if isinstance(attention := settings.get(_ATTENTION), str):
            config._attn_implementation = attention  # noqa: SLF001 - else what the file says is looked for
        return config, {name: value for name, value in unused.items() if name in settings}
    except Exception as error:
        raise ModelError(
            f"{path} does not describe a {model_type} model: {summary_of(error)}."
        ) from error


def _refuse_code_of_the_hub(written: Any, path: Path, *, attention: bool) -> None:
    """Refuse implementations that are code of the hub: transformers would download and run it.

    ``attention``: Also that of attention, for which the caller has named no other; of parts always.
    """
    parts = written.values() if isinstance(written, dict) else written
    for part in parts if isinstance(written, dict | list) else ():
        _refuse_code_of_the_hub(part, path, attention=True)
    if not isinstance(written, dict):
        return
    for name, value in written.items():
        if not name.endswith("_implementation") or (name.endswith(_ATTENTION) and not attention):
            continue
        named = value.values() if isinstance(value, dict) else [value]
        code = [each for each in named if isinstance(each, str) and _is_code_of_the_hub(each)]
        if code:
            instead = " or pass attn_implementation=" if name.endswith(_ATTENTION) else ""
            raise ModelError(
                f"{path} asks for {code[0]!r:.80}, code of the hub, as {name}, which is not run because a model's file says so; "
                f"remove it there{instead}."
            )


def _is_code_of_the_hub(implementation: str) -> bool:
    """Whether it names a repository, or flash attention that is not installed, in whose place transformers takes one."""
    import transformers

    utils: Any = transformers.utils
    if "/" in implementation:
        return True
    found = _FLASH_ATTENTION.fullmatch(implementation)
    if found is None or not utils.is_kernels_available():
        return False
    installed = getattr(utils, f"is_flash_attn_{found[1]}_available", None)
    return installed is None or not installed()


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
    """The class of a model: ``model_class``, or the one that an auto class chooses; or the first of its architectures.

    Raises:
        ModelError: The config names no architecture or one that transformers does not have, or ``model_class`` is not a
            model class of transformers.
    """
    import transformers
    from transformers.models.auto import auto_factory

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
    elif hasattr(model_class, "_model_mapping"):  # an auto class: it chooses by the config
        try:
            choose: Any = auto_factory._get_model_class  # noqa: SLF001 - as it does itself
            model_class = choose(config, model_class._model_mapping)  # noqa: SLF001 - as it does itself
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"{model_class.__name__} has no class for {config.model_type} models; pass another model_class=."
            ) from error
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        raise ModelError(
            f"{getattr(model_class, '__name__', model_class)} is no model class of transformers; "
            "pass one that weights can be loaded into, such as LlamaForCausalLM."
        )
    return model_class


def text_config_of(config: Any) -> Any:
    """The part of a model's config that is about text: the decoder's, if an encoder has one of its own (MusicGen)."""
    try:
        return config.get_text_config()
    except ValueError:  # it has several
        return config.get_text_config(decoder=True)


def summary_of(error: Exception) -> str:
    """The message of an exception in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
