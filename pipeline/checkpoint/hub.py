"""Finds a model by folder, file, or id on the hub (``org/name``, ``org/name:file.gguf``), and downloads it if need be."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerstream.pipeline.checkpoint.formats.gguf_files import all_parts
from layerstream.pipeline.checkpoint.snapshot_files import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    missing_files,
)
from layerstream.pipeline.checkpoint.weight_choice import ANY_WEIGHTS, WeightChoice
from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import first_names

__all__ = ["Lookup", "resolve_model_path"]

logger = logging.getLogger(__name__)

# What a model needs to run: weights, configurations, and the files of its tokenizer.
_DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]

# Folders hold exports for other runtimes, and "consolidated" files the same weights under the
# vendor's own names: either can double a download of a hundred gigabytes.
_IGNORE_PATTERNS = ["*/*", "consolidated*"]

# Of repositories without safetensors.
_BIN_FILE, _BIN_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
_BIN_PATTERNS = ["pytorch_model*.bin", "adapter_model.bin"]

_MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

# A repository holds a GGUF model in many quantisations, so that one file of it is named; it may be in a folder.
_GGUF_SUFFIX = ".gguf"

# For a short query; downloads have huggingface_hub's own timeouts.
_HUB_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """How a model is looked up, and what of it is wanted: arguments of ``from_pretrained``."""

    revision: str | None = None
    """Branch, tag or commit of a model id."""
    subfolder: str = ""
    """The folder in ``source`` that holds the model."""
    cache_dir: str | Path | None = None
    """Instead of huggingface_hub's own cache."""
    token: str | bool | None = None
    """For the hub, instead of the one that is logged in."""
    local_files_only: bool = False
    """Nothing is downloaded."""
    force_download: bool = False
    """It is downloaded again."""
    weights: WeightChoice = ANY_WEIGHTS

    def patterns(self, names: Sequence[str]) -> list[str]:
        """``names`` in the repository, of a model in that subfolder."""
        return [f"{self.subfolder}/{name}" if self.subfolder else name for name in names]


_ANYWHERE = Lookup()


def resolve_model_path(source: str | os.PathLike[str], lookup: Lookup = _ANYWHERE) -> Path:
    """Return the folder or file on this machine that holds the model ``source``.

    Args:
        source: An existing folder or file; or, as a string, a model id. An id is looked up in
            huggingface_hub's local cache first, without the network; a model that is not
            complete there is downloaded into it, with huggingface_hub's own progress bars.
            ``id:file.gguf`` is that file of the repository, with its other parts if there are any.
        lookup: How it is looked up, and what of it is wanted.

    Raises:
        CheckpointError: There is no such model, or it cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.exists():
        if lookup.revision is not None:
            raise CheckpointError(
                f"Revision {lookup.revision!r} was asked for, but {path} is on this disk and has none; "
                "leave the revision out, or give a model id."
            )
        if lookup.subfolder and not (path / lookup.subfolder).is_dir():
            raise CheckpointError(f"{path} has no folder {lookup.subfolder}: check subfolder=.")
        return path / lookup.subfolder
    model_id, colon, file = str(source).partition(":")
    if (
        not isinstance(source, str)
        or not _is_model_id(model_id)
        or (colon and not _is_gguf_path(file))
    ):
        raise CheckpointError(
            f"No such file or folder: {path}; check the path, or give a model id, or id:file.gguf."
        )
    files = [str(Path(file).with_name(name)) for name in all_parts(Path(file).name)] if file else []
    folder = None if lookup.force_download else _cached_snapshot(model_id, lookup, files)
    folder = folder or _download_snapshot(model_id, lookup, files)
    return folder / files[0] if files else folder


def _is_model_id(source: str) -> bool:
    is_file = source.endswith((".safetensors", _GGUF_SUFFIX))
    return _MODEL_ID.fullmatch(source) is not None and not is_file


def _is_gguf_path(file: str) -> bool:
    """Whether ``file`` is the path of a GGUF file in a repository."""
    return file.endswith(_GGUF_SUFFIX) and ".." not in file and file[0] != "/"


def _cached_snapshot(model_id: str, lookup: Lookup, files: Sequence[str]) -> Path | None:
    """Return the cached snapshot of ``model_id`` if it has ``files``, or all its weights if none are given; else None."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"No such file or folder: {model_id}; if it is a model id, huggingface_hub is needed: "
            "pip install 'layerstream[hf]'."
        ) from error
    try:
        # Only the configuration is requested: if everything were, a snapshot that lacks any small
        # file of the repository would count as absent. The weights are checked below.
        folder = snapshot_download(
            model_id,
            revision=lookup.revision,
            cache_dir=lookup.cache_dir,
            local_files_only=True,
            allow_patterns=lookup.patterns([*files] or [CONFIG_FILE, ADAPTER_CONFIG_FILE]),
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CheckpointError(
            f"No such file or folder: {model_id}; nor is it a model id: {_first_line(error)}."
        ) from error
    snapshot = Path(folder) / lookup.subfolder
    missing = missing_files(snapshot, files, lookup.weights)
    if missing:
        logger.info("%s is cached in part and lacks %s", model_id, first_names(missing, 3))
        return None
    return snapshot


def _download_snapshot(model_id: str, lookup: Lookup, files: Sequence[str]) -> Path:
    """Download ``files`` of ``model_id`` into the local cache, or all that a model needs."""
    from huggingface_hub import HfApi, snapshot_download

    if lookup.local_files_only:
        raise CheckpointError(
            f"{_not_local(model_id, lookup)}, and local_files_only= forbids asking the hub: leave it out, or check the path."
        )
    try:
        # Without a network the download would retry for half a minute; this query fails at once.
        info = HfApi().model_info(
            model_id, revision=lookup.revision, timeout=_HUB_TIMEOUT_SECONDS, token=lookup.token
        )
    except Exception as error:
        # The hub's client changes its HTTP library, and so the exceptions, between versions.
        raise CheckpointError(_download_error_message(error, model_id, lookup)) from error
    names = [each.rfilename for each in info.siblings or ()]
    _refuse_choice(model_id, names, files)
    patterns = [*files] or _DOWNLOAD_PATTERNS
    if not files and (lookup.weights.use_safetensors is False or not _has_safetensors(names)):
        patterns = [*patterns, *_BIN_PATTERNS]
    try:
        folder = snapshot_download(
            model_id,
            revision=lookup.revision,
            cache_dir=lookup.cache_dir,
            token=lookup.token,
            force_download=lookup.force_download,
            allow_patterns=lookup.patterns(patterns),
            ignore_patterns=None if files else lookup.patterns(_IGNORE_PATTERNS),
        )
    except Exception as error:
        raise CheckpointError(_download_error_message(error, model_id, lookup)) from error
    snapshot = Path(folder) / lookup.subfolder
    missing = missing_files(snapshot, files, lookup.weights)
    if missing:
        raise CheckpointError(
            f"{model_id} was downloaded to {snapshot}, which lacks {first_names(missing, 3)}: a model "
            "needs config.json and weights in safetensors' or torch's format, or id:file.gguf names one of its GGUF files; try "
            "again, or another model."
        )
    return snapshot


def _refuse_choice(model_id: str, names: Sequence[str], files: Sequence[str]) -> None:
    """Refuse to download files that are not there, or a repository of GGUF models as if it were one."""
    found = sorted(name for name in names if name.endswith(_GGUF_SUFFIX))
    if files and names:
        missing = [name for name in files if name not in names]
        if missing:
            others = f"it has {first_names(found, 12)}" if found else "it has no GGUF files"
            raise CheckpointError(f"{model_id} on the hub has no {missing[0]}: {others}.")
    elif found and not _has_safetensors(names) and not {_BIN_FILE, _BIN_INDEX_FILE} & {*names}:
        raise CheckpointError(
            f"{model_id} on the hub holds GGUF models ({first_names(found, 12)}): name one, as in "
            f"{model_id}:{found[0]}."
        )


def _has_safetensors(names: Sequence[str]) -> bool:
    return any(name.endswith(".safetensors") for name in names)


def _not_local(model_id: str, lookup: Lookup) -> str:
    from huggingface_hub import constants

    cache = lookup.cache_dir or constants.HF_HUB_CACHE
    return f"{model_id} is neither a file or folder here nor complete in the local cache ({cache})"


def _download_error_message(error: Exception, model_id: str, lookup: Lookup) -> str:
    """Return one sentence on why ``model_id`` could not be downloaded, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"The model {model_id} is gated: ask for access on its page on the hub, then log in "
            "with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The model {model_id} has no revision {lookup.revision or 'main'!r} on the hub."
    not_local = _not_local(model_id, lookup)
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{not_local}, and the hub has no such model, or it is private: check the name, or log "
            "in with `hf auth login`."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{not_local}, and offline mode forbids asking the hub: check the path, or unset "
            "HF_HUB_OFFLINE."
        )
    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # the network error, without the client's long advice
    return (
        f"{not_local}, and the hub could not give it "
        f"({type(cause).__name__}: {_first_line(cause)}): check the path, or the network."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
