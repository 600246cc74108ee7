"""Converts a checkpoint into a new folder, file by file, so that it can be interrupted at any time and goes on."""

import hashlib
import importlib.metadata
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.checkpoint.snapshot_files import ADAPTER_WEIGHT_FILES
from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import format_bytes
from layerstream.tools.convert.encoding import Encoding
from layerstream.tools.convert.journal import (
    PARTIAL,
    FinishedShard,
    Journal,
    locked,
    write_durably,
)
from layerstream.tools.convert.layout import ConvertedShard, files_of, lay_out
from layerstream.tools.convert.selection import ChosenWeights, check_loads, choose_weights
from layerstream.tools.convert.shard_file import LayerError, is_intact, write_shard

__all__ = ["Conversion", "Converted", "convert", "plan_conversion"]

_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
# Configs, tokenizers, chat templates, code, and what says under which terms a model may be used.
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What will be written, and from what."""

    checkpoint: Checkpoint
    folder: Path
    encoding: Encoding
    chosen: ChosenWeights
    shards: tuple[ConvertedShard, ...]
    documents: Mapping[str, Path | bytes]
    """The other files by name, in the order in which they are written: config.json is the last. A path is copied."""

    @property
    def source_bytes(self) -> int:
        """What is read."""
        return sum(shard.source_bytes for shard in self.shards)

    @property
    def total_bytes(self) -> int:
        """What is written, without the small files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def job(self) -> dict[str, Any]:
        """Everything that determines the result's bytes, as JSON data."""
        headers = hashlib.sha256(b"".join(shard.header for shard in self.shards)).hexdigest()
        config = self.documents[_CONFIG]
        return {
            "version": _FORMAT_VERSION,
            "source": str(self.checkpoint.path.resolve()),
            "source files": [
                [file.name, file.size_bytes, file.version.modified_ns if file.version else 0]
                for file in self.checkpoint.files
            ],
            "--to": str(self.encoding.target),
            "--group-size": self.encoding.group_size,
            "config.json": hashlib.sha256(config if isinstance(config, bytes) else b"").hexdigest(),
            "tensors or --max-shard-size": headers,
            "compressed-tensors": importlib.metadata.version("compressed-tensors"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written."""

    errors: Mapping[str, LayerError]
    """By layer, in the order of the model."""
    reused_shards: int
    """Files that an earlier, interrupted run had finished."""

    @property
    def error(self) -> LayerError:
        """Of all layers together."""
        return LayerError(*(sum(each) for each in zip(*self.errors.values(), strict=True)))


def plan_conversion(
    checkpoint: Checkpoint, folder: Path, encoding: Encoding, *, max_shard_bytes: int
) -> Conversion:
    """Decide what is converted, and where it is written. Nothing is written, and only headers and configs are read.

    Raises:
        CheckpointError: The checkpoint cannot be converted.
        ModelError: transformers does not know the model, would not load the result, or the model has no weights that
            can be converted.
    """
    chosen = choose_weights(checkpoint, encoding)
    shards = lay_out(checkpoint, chosen.converted, encoding, max_shard_bytes=max_shard_bytes)
    quantization = encoding.config(chosen.ignore)
    check_loads(
        checkpoint,
        chosen,
        files=files_of(shards, folder.absolute()),
        tensors={name: info for shard in shards for name, info in shard.places.items()},
        quantization=quantization,
    )
    return Conversion(
        checkpoint=checkpoint,
        folder=folder,
        encoding=encoding,
        chosen=chosen,
        shards=shards,
        documents=_documents(checkpoint, shards, quantization),
    )


def convert(
    conversion: Conversion, *, advance: Callable[[int], object] = lambda _: None
) -> Converted:
    """Write the converted checkpoint; what an interrupted run has finished is checked and kept.

    Args:
        conversion: From ``plan_conversion``.
        advance: Called with the number of the source's bytes that are done since the last call.

    Raises:
        CheckpointError: The folder holds other files, or cannot be written to; its disk has no room; or a weight is not
            finite.
        ReadError: The source cannot be read.
    """
    folder = conversion.folder
    files = frozenset({*conversion.documents, *(shard.file_name for shard in conversion.shards)})
    Journal(folder, conversion.job, files)  # refuses before a folder is made
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made: {error.strerror}; give another folder."
        ) from error
    with locked(folder):
        journal = Journal(folder, conversion.job, files)
        _drop_damaged(conversion, journal, advance)
        reused = len(journal.finished)
        _check_space(conversion, journal)
        try:
            journal.save()
            _write_shards(conversion, journal, advance)
            _complete(conversion)
            journal.remove()
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or folder} cannot be written: {error.strerror or error}; once that is mended, the same "
                "command goes on where it stopped."
            ) from error
    return Converted(errors=_by_layer(conversion, journal), reused_shards=reused)


def _complete(conversion: Conversion) -> None:
    """Give all files their names, and write the small ones."""
    folder = conversion.folder
    for shard in conversion.shards:
        _path_of(folder, shard).replace(folder / shard.file_name)
    for name, content in conversion.documents.items():
        if isinstance(content, bytes):
            write_durably(folder / name, content)
        else:
            shutil.copyfile(content, folder / name)


def _drop_damaged(
    conversion: Conversion, journal: Journal, advance: Callable[[int], object]
) -> None:
    """Forget the finished files that are not what was written."""
    for shard in conversion.shards:
        done = journal.finished.get(shard.file_name)
        if done is None:
            continue
        path = _path_of(conversion.folder, shard)
        if path.is_file() and is_intact(path, shard, done.checksum):
            advance(shard.source_bytes)
        else:
            del journal.finished[shard.file_name]


def _write_shards(
    conversion: Conversion, journal: Journal, advance: Callable[[int], object]
) -> None:
    layers = {
        name: layer.name for layer in group_layers(conversion.checkpoint) for name in layer.tensors
    }
    with closing(SourceReader(conversion.checkpoint)) as reader:
        for shard in conversion.shards:
            if shard.file_name in journal.finished:
                continue
            (conversion.folder / shard.file_name).unlink(missing_ok=True)  # a damaged one
            checksum, errors = write_shard(
                conversion.folder / f"{shard.file_name}{PARTIAL}",
                shard,
                reader=reader,
                encoding=conversion.encoding,
                layers=layers,
                advance=advance,
            )
            journal.add(shard.file_name, FinishedShard(checksum, errors))


def _path_of(folder: Path, shard: ConvertedShard) -> Path:
    """Where a finished file is: under its own name once all are finished."""
    path = folder / shard.file_name
    return path if path.exists() else path.with_name(path.name + PARTIAL)


def _check_space(conversion: Conversion, journal: Journal) -> None:
    folder = conversion.folder
    left = [shard for shard in conversion.shards if shard.file_name not in journal.finished]
    old = [folder / f"{shard.file_name}{PARTIAL}" for shard in left]
    need = sum(shard.nbytes for shard in left)
    need += sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in conversion.documents.values()
    )
    free = shutil.disk_usage(folder).free
    free += sum(path.stat().st_size for path in old if path.exists())
    if need > free:
        raise CheckpointError(
            f"Converting needs {format_bytes(need)}, and the disk of {folder} has {format_bytes(free)} free; make room, "
            "or give a folder on another disk."
        )


def _by_layer(conversion: Conversion, journal: Journal) -> dict[str, LayerError]:
    sums: defaultdict[str, list[LayerError]] = defaultdict(list)
    for done in journal.finished.values():
        for layer, error in done.errors.items():
            sums[layer].append(error)
    return {
        layer.name: LayerError(*(sum(each) for each in zip(*sums[layer.name], strict=True)))
        for layer in group_layers(conversion.checkpoint)
        if layer.name in sums
    }


def _documents(
    checkpoint: Checkpoint, shards: tuple[ConvertedShard, ...], quantization: Mapping[str, Any]
) -> dict[str, Path | bytes]:
    source = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    weights = {file.name for file in checkpoint.files} | {*checkpoint.ignored_files}
    documents: dict[str, Path | bytes] = {}
    for path in sorted(source.iterdir()):
        small = path.suffix in _COPIED or path.name.startswith(_COPIED_NAMES)
        other = path.name in weights or path.name.endswith(".index.json") or path.name == _CONFIG
        beside = path.name in ADAPTER_WEIGHT_FILES  # computes with the converted model, too
        if (beside or (small and not other)) and path.is_file():
            documents[path.name] = path
    if len(shards) > 1:
        places = {name: shard.file_name for shard in shards for name in shard.places}
        total = sum(info.nbytes for shard in shards for info in shard.places.values())
        documents[_INDEX] = _json({"metadata": {"total_size": total}, "weight_map": places})
    config = json.loads((source / _CONFIG).read_bytes())
    documents[_CONFIG] = _json({**config, "quantization_config": quantization})
    return documents


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
