"""Finds a model by folder, file, or id on the hub such as ``org/name``, and downloads it if need be."""

import asyncio
import json
import logging
import os
import re
from pathlib import Path

from layerstream.stages.errors import CheckpointError

__all__ = ["resolve_model_path", "resolve_model_path_async"]

logger = logging.getLogger(__name__)

# What a model needs to run: weights, configurations, and the files of its tokenizer.
_DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]

# Folders hold exports for other runtimes, and "consolidated" files the same weights under the
# vendor's own names: either can double a download of a hundred gigabytes.
_IGNORE_PATTERNS = ["*/*", "consolidated*"]

_INDEX_FILE = "model.safetensors.index.json"
_CONFIG_FILE = "config.json"

_MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

# For a short query; downloads have huggingface_hub's own timeouts.
_HUB_TIMEOUT_SECONDS = 10.0


def resolve_model_path(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the folder or file on this machine that holds the model ``source``.

    Args:
        source: An existing folder or file; or, as a string, a model id. An id is looked up in
            huggingface_hub's local cache first, without the network; a model that is not
            complete there is downloaded into it, with huggingface_hub's own progress bars.
        revision: Branch, tag or commit of a model id.

    Raises:
        CheckpointError: There is no such model, or it cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(
                f"Revision {revision!r} was asked for, but {path} is on this disk and has none; "
                "leave the revision out, or give a model id."
            )
        return path
    if not isinstance(source, str) or not _is_model_id(source):
        raise CheckpointError(
            f"No such file or folder: {path}; check the path, or give a model id."
        )
    return _cached_snapshot(source, revision) or _download_snapshot(source, revision)


async def resolve_model_path_async(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> Path:
    """The same as ``resolve_model_path``, without blocking the event loop.

    A download cannot be interrupted: if the waiting task is cancelled, the download goes on in its
    thread, into the cache, where the next call finds it. It uses no buffer of the pipeline, so
    nothing has to wait for its end.
    """
    return await asyncio.to_thread(resolve_model_path, source, revision=revision)


def _is_model_id(source: str) -> bool:
    return _MODEL_ID.fullmatch(source) is not None and not source.endswith(".safetensors")


def _cached_snapshot(model_id: str, revision: str | None) -> Path | None:
    """Return the cached snapshot of ``model_id`` if it has all its weights, else None."""
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
            model_id, revision=revision, local_files_only=True, allow_patterns=[_CONFIG_FILE]
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CheckpointError(
            f"No such file or folder: {model_id}; nor is it a model id: {_first_line(error)}."
        ) from error
    snapshot = Path(folder)
    missing = _missing_files(snapshot)
    if missing:
        logger.info("%s is cached in part and lacks %s", model_id, _first_names(missing))
        return None
    return snapshot


def _download_snapshot(model_id: str, revision: str | None) -> Path:
    """Download ``model_id`` into the local cache."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Without a network the download would retry for half a minute; this query fails at once.
        HfApi().model_info(model_id, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
        folder = snapshot_download(
            model_id,
            revision=revision,
            allow_patterns=_DOWNLOAD_PATTERNS,
            ignore_patterns=_IGNORE_PATTERNS,
        )
    except Exception as error:
        # The hub's client changes its HTTP library, and so the exceptions, between versions.
        raise CheckpointError(_download_error_message(error, model_id, revision)) from error
    missing = _missing_files(Path(folder))
    if missing:
        raise CheckpointError(
            f"{model_id} was downloaded to {folder}, which lacks {_first_names(missing)}: a model "
            "needs config.json and weights in safetensors format; try again, or another model."
        )
    return Path(folder)


def _missing_files(snapshot: Path) -> list[str]:
    """Return the files that ``snapshot`` should have and does not.

    A link to a blob that was deleted from the cache counts as missing.
    """
    missing = [] if (snapshot / _CONFIG_FILE).is_file() else [_CONFIG_FILE]
    index = snapshot / _INDEX_FILE
    if not index.is_file():
        weights = any(path.is_file() for path in snapshot.glob("*.safetensors"))
        return missing if weights else [*missing, "*.safetensors"]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return missing + [shard for shard in shards if not (snapshot / shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return missing  # not a valid index: Checkpoint.open refuses it, and says why


def _download_error_message(error: Exception, model_id: str, revision: str | None) -> str:
    """Return one sentence on why ``model_id`` could not be downloaded, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"The model {model_id} is gated: ask for access on its page on the hub, then log in "
            "with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The model {model_id} has no revision {revision or 'main'!r} on the hub."
    not_local = (
        f"{model_id} is neither a file or folder here nor complete in the local cache "
        f"({constants.HF_HUB_CACHE})"
    )
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


def _first_names(names: list[str], *, count: int = 3) -> str:
    """Return the first ``count`` names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
