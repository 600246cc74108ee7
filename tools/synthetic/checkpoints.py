"""Whole synthetic checkpoints: a folder as downloaded from a hub."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import format_bytes
from layerstream.tools.console.files import naming
from layerstream.tools.synthetic.byte_tokenizer import VOCAB_SIZE, tokenizer_files
from layerstream.tools.synthetic.families import Config
from layerstream.tools.synthetic.shapes import Tensor, tensors_of
from layerstream.tools.synthetic.weights import data_bytes, header, noise, sharded, write_shard

__all__ = ["CheckpointSpec", "MadeCheckpoint", "make_checkpoint"]

# Marks a folder as made here; lists its files, and whether all of them are complete.
_RECORD = "layerstream-checkpoint.json"

# Suffix of all file names until every file is complete.
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSpec:
    """Everything that determines a checkpoint's bytes."""

    family: str
    config: Config
    dtype: str
    max_shard_bytes: int
    seed: int
    sparse: bool
    skew: float = 0.0
    """How unequal the routers of a mixture of experts use them; 0: about equally."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeCheckpoint:
    """Size of a checkpoint, and whether an existing one was reused."""

    folder: Path
    tensors: int
    shards: int
    total_bytes: int
    reused: bool


def make_checkpoint(
    folder: Path, spec: CheckpointSpec, *, advance: Callable[[int], object] = lambda _: None
) -> MadeCheckpoint:
    """Write the checkpoint of ``spec`` into ``folder``, unless it is there already.

    Files get their final names when all of them are complete, so that a partial checkpoint never looks
    complete; what an interrupted run left is written again.

    Args:
        folder: A new or empty folder, or one from an earlier call.
        spec: What to write. A sparse checkpoint has true headers and holes for weights.
        advance: Called with the number of bytes of weights written since the last call.

    Raises:
        CheckpointError: The folder holds other files, or its disk is full.
    """
    shards = _shards(spec)
    documents = _documents(shards, spec)
    sizes = {name: len(content) for name, content in documents.items()}
    for name, tensors in shards.items():
        sizes[name] = len(header(tensors, spec.dtype)) + data_bytes(tensors, spec.dtype)
    made = MadeCheckpoint(
        folder=folder,
        tensors=sum(map(len, shards.values())),
        shards=len(shards),
        total_bytes=sum(sizes.values()),
        reused=False,
    )
    record = json.loads(json.dumps({"recipe": asdict(spec), "files": sizes, "complete": True}))
    try:
        before = _read_record(folder)
        if before == record and all(_size(folder / name) == sizes[name] for name in sizes):
            return replace(made, reused=True)
        old = [folder / f"{name}{end}" for name in before["files"] for end in ("", _PARTIAL)]
        if not spec.sparse:
            _check_space(folder, need_bytes=made.total_bytes, old=old)
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, {**record, "complete": False})
        for path in old:
            path.unlink(missing_ok=True)
        _write_files(folder, shards, documents, spec=spec, advance=advance)
        _write_record(folder, record)
    except OSError as error:
        raise CheckpointError(
            f"Cannot make the checkpoint of {format_bytes(made.total_bytes)}: "
            f"{error.filename or folder}: {error.strerror}."
        ) from error
    return made


def _shards(spec: CheckpointSpec) -> dict[str, list[Tensor]]:
    """The tensors of each weight file, by file name."""
    tensors = tensors_of(spec.config)
    groups = list(sharded(tensors, dtype=spec.dtype, max_shard_bytes=spec.max_shard_bytes))
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{index:05}-of-{len(groups):05}.safetensors": group
        for index, group in enumerate(groups, start=1)
    }


def _documents(shards: Mapping[str, list[Tensor]], spec: CheckpointSpec) -> dict[str, bytes]:
    """The contents of all files except the weights, by file name."""
    config = spec.config
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    documents: dict[str, Any] = {
        "config.json": {**config, "dtype": spec.dtype, "use_cache": True},
        "generation_config.json": {key: config[key] for key in token_ids if key in config},
    }
    if config["vocab_size"] >= VOCAB_SIZE:
        documents |= tokenizer_files()
    if len(shards) > 1:
        total = sum(data_bytes(group, spec.dtype) for group in shards.values())
        documents["model.safetensors.index.json"] = {
            "metadata": {"total_size": total},
            "weight_map": {tensor.name: name for name in shards for tensor in shards[name]},
        }
    return {name: (json.dumps(data, indent=2) + "\n").encode() for name, data in documents.items()}


def _write_files(
    folder: Path,
    shards: Mapping[str, list[Tensor]],
    documents: Mapping[str, bytes],
    *,
    spec: CheckpointSpec,
    advance: Callable[[int], object],
) -> None:
    block = None if spec.sparse else noise(spec.seed, spec.dtype)
    partial = {name: folder / f"{name}{_PARTIAL}" for name in [*shards, *documents]}
    try:
        for name, tensors in shards.items():
            write_shard(
                partial[name],
                tensors,
                dtype=spec.dtype,
                block=block,
                skew=spec.skew,
                advance=advance,
            )
        for name, content in documents.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            path.replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _check_space(folder: Path, *, need_bytes: int, old: Iterable[Path]) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free + sum(_size(path) or 0 for path in old)
    if need_bytes > free_bytes:
        raise CheckpointError(
            f"The checkpoint needs {format_bytes(need_bytes)} and the disk of {folder} has "
            f"{format_bytes(free_bytes)} free: choose another folder or fewer layers, or make it "
            "sparse if only its headers are wanted."
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _read_record(folder: Path) -> dict[str, Any]:
    """The record in ``folder``; one without files if the folder is new or empty."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint needs a folder of its own.")
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        names = [Path(name).name for name in record["files"]]
        if names != list(record["files"]):
            raise ValueError("its files lie in other folders")  # noqa: TRY301 - handled below like other damage
    except FileNotFoundError:
        if folder.exists() and any(path.name != _RECORD + _PARTIAL for path in folder.iterdir()):
            raise CheckpointError(
                f"{folder} holds files that were not made by make-checkpoint; choose a new or "
                "empty folder."
            ) from None
        return {"files": {}}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / _RECORD} is damaged ({error}); remove {folder} to have it made anew."
        ) from error
    return dict(record)


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    new = folder / (_RECORD + _PARTIAL)
    with naming(new):
        new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    new.replace(folder / _RECORD)
