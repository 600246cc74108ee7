"""Folders with an adapter: its adapter_config.json, its tensors, and the base model that it names. Headers only."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.files import translated_os_errors
from layerstream.pipeline.checkpoint.hub import Lookup, resolve_model_path
from layerstream.pipeline.checkpoint.snapshot_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHT_FILES,
)
from layerstream.pipeline.checkpoint.weight_choice import ANY_WEIGHTS, WeightChoice
from layerstream.stages.errors import CheckpointError

__all__ = ["OWN_ADAPTER", "AdapterFolder", "Sources", "resolve_sources"]

OWN_ADAPTER = "default"
"""The name of the adapter in the folder that was opened; PEFT and transformers call it so, too."""

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """An adapter as PEFT has saved it."""

    name: str
    """By which requests choose it."""
    path: Path
    config: Mapping[str, Any]
    """What adapter_config.json says."""
    weights: Checkpoint
    beside_model: bool = False
    """Whether the folder holds the complete model, too."""

    @property
    def float32_bytes(self) -> int:
        """Bytes of its tensors as PEFT computes with them, which takes smaller floating-point numbers as float32."""
        tensors = self.weights.tensors.values()
        return sum(max(each.nbytes, _FLOAT32_BYTES * prod(each.shape)) for each in tensors)

    @property
    def base(self) -> str | None:
        """The base model that its config names: a path or a hub id."""
        base = self.config.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    @classmethod
    def open(cls, path: Path, *, name: str) -> Self:
        """Read the config and the headers of the adapter in the folder ``path``.

        Raises:
            CheckpointError: It holds no adapter, or its files are corrupt.
        """
        if not _holds_adapter(path):
            raise CheckpointError(
                f"{path} holds no adapter ({ADAPTER_CONFIG_FILE} is not there): give a folder that PEFT's save_pretrained has "
                "written, or its hub id."
            )
        file = next((path / each for each in ADAPTER_WEIGHT_FILES if (path / each).is_file()), None)
        if file is None:
            raise CheckpointError(
                f"{path} has {ADAPTER_CONFIG_FILE}, but not the adapter's weights ({' or '.join(ADAPTER_WEIGHT_FILES)}): save it with "
                "PEFT's save_pretrained, or download it again."
            )
        return cls(
            name=name,
            path=path,
            config=MappingProxyType(_read_config(path / ADAPTER_CONFIG_FILE)),
            weights=Checkpoint.open(file),
            beside_model=_holds_model(path),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """A model, and the adapters that requests may choose."""

    source: Path
    """The folder or file that was given."""
    model: Path
    """The folder or file with the model itself."""
    adapters: tuple[AdapterFolder, ...] = ()
    weights: WeightChoice = ANY_WEIGHTS
    """Which weights of the model are wanted."""
    default: str | None = None
    """The adapter that applies if a request chooses none; None for the base model."""

    @property
    def documents(self) -> tuple[Path, ...]:
        """Where to look for tokenizers and templates, first of all: the adapter's own folder, then the model."""
        own = [each.path for each in self.adapters if each.name == self.default]
        return (*own, self.model)


def resolve_sources(
    source: str | os.PathLike[str],
    lookup: Lookup | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
) -> Sources:
    """Find the model that ``source`` is, or that the adapter there belongs to, and all adapters.

    Args:
        source: A folder, file or hub id of a model, with or without an adapter in its folder, or of an adapter alone.
        lookup: How it is looked up.
        base: The model of an adapter alone, instead of the one that its config names.
        adapters: Further ones, folders or hub ids, by the names by which requests choose them.

    Raises:
        CheckpointError: One of them is not there, or corrupt.
    """
    lookup = lookup or Lookup()
    path = resolve_model_path(source, lookup)
    own = [AdapterFolder.open(path, name=OWN_ADAPTER)] if _holds_adapter(path) else []
    alone = bool(own) and not own[0].beside_model
    if base is not None and not alone:
        raise CheckpointError(
            f"base={os.fspath(base)!r} is for a folder with an adapter alone, and {path} is a model: leave it out."
        )
    # Files are chosen by these in the folder that was given, not in others.
    elsewhere = replace(lookup, revision=None, subfolder="", weights=ANY_WEIGHTS)
    model = _base_of(own[0], base, elsewhere) if alone else path
    if alone and _holds_adapter(model):
        raise CheckpointError(
            f"the base model of {path} is {model}, which has an adapter of its own: give the model without it as base= "
            "(--base in commands)."
        )
    given = [
        AdapterFolder.open(resolve_model_path(each, elsewhere), name=_checked_name(name, own))
        for name, each in adapters.items()
    ]
    return Sources(
        source=path,
        model=model,
        adapters=(*own, *given),
        weights=ANY_WEIGHTS if alone else lookup.weights,
        default=OWN_ADAPTER if own else None,
    )


def _holds_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG_FILE).is_file()


def _holds_model(path: Path) -> bool:
    """Whether there is a model besides an adapter."""
    return (path / "config.json").is_file() or any(path.glob("*.gguf"))


def _checked_name(name: str, own: list[AdapterFolder]) -> str:
    if not isinstance(name, str) or not name.strip():
        raise CheckpointError(
            f"{name!r} is no name of an adapter: give each one that is not empty."
        )
    if own and name == OWN_ADAPTER:
        raise CheckpointError(
            f"{name!r} is the adapter in {own[0].path} itself: give the other one another name."
        )
    return name


def _read_config(path: Path) -> dict[str, Any]:
    with translated_os_errors(path):
        content = path.read_bytes()
    try:
        config = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again.")
    return config


def _base_of(adapter: AdapterFolder, given: str | os.PathLike[str] | None, lookup: Lookup) -> Path:
    """The model of an adapter that is alone in its folder."""
    if given is not None:
        return resolve_model_path(given, lookup)
    if adapter.base is None:
        raise CheckpointError(
            f"{adapter.path} holds an adapter alone, and its {ADAPTER_CONFIG_FILE} names no base model: give the model as base= "
            "(--base in commands)."
        )
    revision = adapter.config.get("revision") if not Path(adapter.base).exists() else None
    try:
        return resolve_model_path(adapter.base, replace(lookup, revision=revision))
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter.path} holds an adapter alone, and its {ADAPTER_CONFIG_FILE} names the base model {adapter.base}: {error} "
            "Or give the model as base= (--base in commands)."
        ) from error
