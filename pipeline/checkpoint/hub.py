"""Where a model comes from: a folder, a file, or an id on the hub such as ``org/name``."""

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
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]

# Folders hold exports for other runtimes, and "consolidated" files the same weights under the
# vendor's own names: either can double a download of a hundred gigabytes.
_UNWANTED = ["*/*", "consolidated*"]

_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"

_MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

# For a short query; downloads have huggingface_hub's own limits.
_HUB_ANSWER_SECONDS = 10.0


def resolve_model_path(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The folder or file on this machine that holds the model ``source``.

    Args:
        source: An existing folder or file; or, as a string, a model id. An id is looked up in
            huggingface_hub's local cache first, without the network; a model that is not there in
            full is downloaded into it, with huggingface_hub's own progress.
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
    return _from_cache(source, revision) or _from_hub(source, revision)


async def resolve_model_path_async(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> Path:
    """The same as :func:`resolve_model_path`, without blocking the event loop.

    A download cannot be interrupted: when the waiting task is cancelled, it goes on in its thread,
    into the cache, where the next call finds it. It uses no buffer of ours, so nothing has to wait
    for its end.
    """
    return await asyncio.to_thread(resolve_model_path, source, revision=revision)


def _is_model_id(source: str) -> bool:
    return _MODEL_ID.fullmatch(source) is not None and not source.endswith(".safetensors")


def _from_cache(model_id: str, revision: str | None) -> Path | None:
    """The cached snapshot of ``model_id``, if it is there with all its weights."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"No such file or folder: {model_id}; if it is a model id, huggingface_hub is needed: "
            "pip install 'layerstream[hf]'."
        ) from error
    try:
        # Asked for the configuration only: if asked for all, a snapshot that lacks any small file
        # of the repository counts as absent. The weights matter, and those are checked below.
        folder = snapshot_download(
            model_id, revision=revision, local_files_only=True, allow_patterns=[_CONFIG]
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CheckpointError(
            f"No such file or folder: {model_id}; nor is it a model id: {_first_line(error)}."
        ) from error
    snapshot = Path(folder)
    missing = _missing(snapshot)
    if missing:
        logger.info("%s is cached in part and lacks %s", model_id, _some(missing))
        return None
    return snapshot


def _from_hub(model_id: str, revision: str | None) -> Path:
    """Download ``model_id`` into the local cache."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Without a network the download would retry for half a minute; this query fails at once.
        HfApi().model_info(model_id, revision=revision, timeout=_HUB_ANSWER_SECONDS)
        folder = snapshot_download(
            model_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except Exception as error:
        # The hub's client changes its HTTP library, and so the exceptions, between versions.
        raise CheckpointError(_explained(error, model_id, revision)) from error
    missing = _missing(Path(folder))
    if missing:
        raise CheckpointError(
            f"{model_id} was downloaded to {folder}, which lacks {_some(missing)}: a model needs "
            "config.json and weights in safetensors format; try again, or another model."
        )
    return Path(folder)


def _missing(snapshot: Path) -> list[str]:
    """The files that ``snapshot`` should have and does not.

    A link to a blob that was deleted from the cache is not a file, so that is missing too.
    """
    missing = [] if (snapshot / _CONFIG).is_file() else [_CONFIG]
    index = snapshot / _INDEX
    if not index.is_file():
        weights = any(path.is_file() for path in snapshot.glob("*.safetensors"))
        return missing if weights else [*missing, "*.safetensors"]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return missing + [shard for shard in shards if not (snapshot / shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return missing  # not an index at all: Checkpoint refuses it, and says why


def _explained(error: Exception, model_id: str, revision: str | None) -> str:
    """One sentence on why ``model_id`` could not be downloaded, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"The model {model_id} is gated: ask for access on its page on the hub, then log in "
            "with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The model {model_id} has no revision {revision or 'main'!r} on the hub."
    nowhere = (
        f"{model_id} is neither a file or folder here nor complete in the local cache "
        f"({constants.HF_HUB_CACHE})"
    )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{nowhere}, and the hub has no such model, or it is private: check the name, or log "
            "in with `hf auth login`."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{nowhere}, and offline mode forbids asking the hub: check the path, or unset "
            "HF_HUB_OFFLINE."
        )
    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # the network's error, without the client's page of advice
    return (
        f"{nowhere}, and the hub could not give it ({type(cause).__name__}: {_first_line(cause)}): "
        "check the path, or the network."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")


def _some(names: list[str], *, shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
