"""Whole checkpoints with random weights, or none: a folder as a hub would give it."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import format_bytes
from layerstream.tools.synthetic.byte_tokenizer import VOCAB_SIZE, tokenizer_files
from layerstream.tools.synthetic.families import Config
from layerstream.tools.synthetic.shapes import Tensor, tensors_of
from layerstream.tools.synthetic.weights import data_bytes, header, noise, sharded, write_shard

__all__ = ["CheckpointSpec", "Made", "make_checkpoint"]

# Says that a folder is ours, which files belong to it, and whether all of them are there.
_RECORD = "layerstream-checkpoint.json"

# A file has this at the end of its name until every file is whole.
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSpec:
    """All that decides a checkpoint's bytes."""

    family: str
    config: Config
    dtype: str
    max_shard_bytes: int
    seed: int
    sparse: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a checkpoint holds, and whether it was there before."""

    folder: Path
    tensors: int
    shards: int
    total_bytes: int
    reused: bool


def make_checkpoint(
    folder: Path, recipe: CheckpointSpec, *, advance: Callable[[int], object] = lambda _: None
) -> Made:
    """Write the checkpoint of ``recipe`` into ``folder``, unless it is there already.

    Files get their names when all of them are whole, so that a folder never holds half a
    checkpoint that looks like one; what an interrupted run left is written anew.

    Args:
        folder: A new or empty folder, or one that was made here before.
        recipe: What to write. A sparse checkpoint has true headers and holes for weights.
        advance: Told how many bytes of weights were written since the last call.

    Raises:
        CheckpointError: The folder is not ours to write in, or its disk is full.
    """
    shards = _named(recipe)
    documents = _documents(shards, recipe)
    sizes = {name: len(content) for name, content in documents.items()}
    for name, tensors in shards.items():
        sizes[name] = len(header(tensors, recipe.dtype)) + data_bytes(tensors, recipe.dtype)
    made = Made(
        folder=folder,
        tensors=sum(map(len, shards.values())),
        shards=len(shards),
        total_bytes=sum(sizes.values()),
        reused=False,
    )
    record = json.loads(json.dumps({"recipe": asdict(recipe), "files": sizes, "complete": True}))
    try:
        before = _read_record(folder)
        if before == record and all(_size(folder / name) == sizes[name] for name in sizes):
            return replace(made, reused=True)
        old = [folder / f"{name}{end}" for name in before["files"] for end in ("", _PARTIAL)]
        if not recipe.sparse:
            _check_space(folder, need_bytes=made.total_bytes, old=old)
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, {**record, "complete": False})
        for path in old:
            path.unlink(missing_ok=True)
        _write_files(folder, shards, documents, recipe=recipe, advance=advance)
        _write_record(folder, record)
    except OSError as error:
        raise CheckpointError(
            f"Cannot make the checkpoint of {format_bytes(made.total_bytes)}: "
            f"{error.filename or folder}: {error.strerror}."
        ) from error
    return made


def _named(recipe: CheckpointSpec) -> dict[str, list[Tensor]]:
    """The tensors of each weight file, by its name."""
    tensors = tensors_of(recipe.config)
    groups = list(sharded(tensors, dtype=recipe.dtype, max_shard_bytes=recipe.max_shard_bytes))
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{index:05}-of-{len(groups):05}.safetensors": group
        for index, group in enumerate(groups, start=1)
    }


def _documents(shards: Mapping[str, list[Tensor]], recipe: CheckpointSpec) -> dict[str, bytes]:
    """Every file beside the weights, by name."""
    config = recipe.config
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    documents: dict[str, Any] = {
        "config.json": {**config, "dtype": recipe.dtype, "use_cache": True},
        "generation_config.json": {key: config[key] for key in tokens if key in config},
    }
    if config["vocab_size"] >= VOCAB_SIZE:
        documents |= tokenizer_files()
    if len(shards) > 1:
        total = sum(data_bytes(group, recipe.dtype) for group in shards.values())
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
    recipe: CheckpointSpec,
    advance: Callable[[int], object],
) -> None:
    block = None if recipe.sparse else noise(recipe.seed, recipe.dtype)
    partial = {name: folder / f"{name}{_PARTIAL}" for name in [*shards, *documents]}
    try:
        for name, tensors in shards.items():
            write_shard(partial[name], tensors, dtype=recipe.dtype, block=block, advance=advance)
        for name, content in documents.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            path.replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _check_space(folder: Path, *, need_bytes: int, old: Iterable[Path]) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    have_bytes = shutil.disk_usage(there).free + sum(_size(path) or 0 for path in old)
    if need_bytes > have_bytes:
        raise CheckpointError(
            f"The checkpoint needs {format_bytes(need_bytes)} and the disk of {folder} has "
            f"{format_bytes(have_bytes)} free: choose another folder or fewer layers, or make it "
            "sparse if only its headers are wanted."
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of what was made in ``folder``; of nothing, where there is nothing."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint needs a folder of its own.")
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        names = [Path(name).name for name in record["files"]]
        if names != list(record["files"]):
            raise ValueError("its files lie in other folders")  # noqa: TRY301 refused like the rest
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
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    new.replace(folder / _RECORD)
