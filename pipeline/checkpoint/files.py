"""Which files of a folder make up a model: one file, the shards of an index, or all shards."""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from layerstream.pipeline.checkpoint.formats.format import Format, WeightFile
from layerstream.pipeline.checkpoint.formats.registry import FORMATS, format_by_name
from layerstream.pipeline.checkpoint.other_formats import (
    no_weights_message,
    refuse_compiled_file,
    refuse_other_framework,
)
from layerstream.pipeline.checkpoint.problems import Problems
from layerstream.pipeline.checkpoint.weight_choice import ANY_WEIGHTS, WeightChoice
from layerstream.stages.errors import CheckpointError
from layerstream.stages.readers.files import FileVersion

__all__ = [
    "Listing",
    "Selection",
    "list_files",
    "natural_order",
    "refuse_special_files",
    "select_files",
    "translated_os_errors",
]

# What is read of a folder beside the weights: configs, the index, tokenizers, chat templates.
_DOCUMENTS = (".json", ".txt", ".model", ".jinja")

_ERRNO_EXPLANATIONS = {
    errno.ENOENT: "it is not there; check the path, or download it again",
    errno.ENOTDIR: "a part of its path is a file, not a folder; check the path",
    errno.EISDIR: "it is a folder where a file is needed; download the model again",
    errno.EACCES: "permission denied; make it readable for this user",
    errno.EPERM: "permission denied; make it readable for this user",
    errno.ELOOP: "its links lead round in a circle; download it again",
    errno.ENAMETOOLONG: "the path is too long; check it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The relevant files of a folder; ``documents`` must be read before ``select_files``."""

    path: Path
    folder: Path
    format: Format
    """That of the weights."""
    weights: tuple[str, ...]
    """Names of weight files, in natural order."""
    index: Path | None
    config: Path | None
    single_file: str | None
    """The name of the file that is the whole model, wherever it is there."""

    @property
    def documents(self) -> list[Path]:
        """The index and config.json, where they exist."""
        return [path for path in (self.index, self.config) if path]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The files that make up the model."""

    path: Path
    format: Format
    files: tuple[WeightFile, ...]
    weight_map: Mapping[str, str]
    """The file of each tensor, as tensor -> ``WeightFile.name``; empty without an index."""
    config: Mapping[str, Any] | None
    ignored_files: tuple[str, ...]


def natural_order(text: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that puts "layers.2" before "layers.10"."""
    parts = re.split("([0-9]+)", text)
    # Digits compare by length, then as text, since int() refuses very long numbers.
    parts[1::2] = (digits.lstrip("0") for digits in parts[1::2])
    return *((len(part) * (number % 2), part) for number, part in enumerate(parts)), (0, text)


@contextmanager
def translated_os_errors(path: Path) -> Iterator[None]:
    """Turn operating system errors about ``path`` into a CheckpointError of one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte in it
        code = error.errno if isinstance(error, OSError) else None
        reason = _ERRNO_EXPLANATIONS.get(code or 0, f"{error}; check the path and the disk")
        raise CheckpointError(f"{path} cannot be opened: {reason}.") from error


def refuse_special_files(folder: Path) -> None:
    """Refuse a folder in which something that would be read is no file: reading a pipe or a device may never end.

    Raises:
        CheckpointError: It names what is no file.
    """
    with translated_os_errors(folder), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(_DOCUMENTS) and not entry.is_file() and os.path.exists(entry):  # noqa: PTH110
                _refuse_special_file(Path(entry))


def _refuse_special_file(path: Path) -> None:
    raise CheckpointError(
        f"{path} is no regular file, and reading it may never end: replace it by the model's own, or remove it."
    )


def list_files(path: Path, choice: WeightChoice = ANY_WEIGHTS) -> Listing:
    """List the weight files in a folder, of the first format that is there; or a single file. And its config.json."""
    path = path.absolute()
    with translated_os_errors(path):
        refuse_compiled_file(path)
        if not path.is_dir():
            if str(choice):
                raise CheckpointError(
                    f"{path} is one file, among which {choice} cannot choose: leave that out, or give the folder."
                )
            config = path.with_name("config.json")
            if config.exists() and not config.is_file():
                _refuse_special_file(config)
            return Listing(
                path=path,
                folder=path.parent,
                format=format_by_name(path.name) or FORMATS[0],
                weights=(path.name,),
                index=None,
                config=config if config.is_file() else None,
                single_file=None,
            )
        refuse_special_files(path)
        with os.scandir(path) as entries:
            names = sorted((e.name for e in entries if not e.is_dir()), key=natural_order)
    for known in choice.formats:
        weights = tuple(name for name in names if name.lower().endswith(known.suffixes))
        index = _index_of(known, path, names, choice)
        single = choice.name(known.single_file)
        # Many a .bin holds no weights, but arguments of a training, or the state of an optimiser.
        of_any_name = known.of_any_name and choice.variant is None
        if index or (weights and (of_any_name or single in weights)):
            return Listing(
                path=path,
                folder=path,
                format=known,
                weights=weights,
                index=index,
                config=path / "config.json" if "config.json" in names else None,
                single_file=single,
            )
    if str(choice):
        raise CheckpointError(choice.missing_message(path, names))
    with translated_os_errors(path):
        everything = sorted((each.name for each in path.iterdir()), key=natural_order)
    raise CheckpointError(no_weights_message(path, everything))


def _index_of(
    known: Format, folder: Path, names: Sequence[str], choice: WeightChoice
) -> Path | None:
    if known.index_file is None:
        return None
    if choice.variant is not None:
        index = choice.name(known.index_file)
        return folder / str(index) if index in names else None
    indices = [name for name in names if name.endswith(f"{known.suffixes[0]}.index.json")]
    if len(indices) > 1 and known.index_file not in indices:
        raise CheckpointError(
            f"{folder} holds several indices ({', '.join(indices)}), and it is unclear which one "
            f"counts; name that one {known.index_file}."
        )
    index = known.index_file if known.index_file in indices else next(iter(indices), None)
    return folder / index if index else None


def select_files(
    listing: Listing, documents: Mapping[Path, bytes], problems: Problems
) -> Selection:
    """Decide which weight files make up the model.

    Args:
        listing: The files that exist.
        documents: The contents of ``listing.documents``, by path.
        problems: Notes the files that are needed and absent; without those, the selection is not complete.

    Raises:
        CheckpointError: The index or config.json is corrupt.
    """
    config = _parse_object(listing.config, documents) if listing.config else None
    known = listing.format
    weight_map: Mapping[str, str] = (
        _parse_weight_map(listing.index, documents) if listing.index else {}
    )
    names: Sequence[str] = sorted(set(weight_map.values()), key=natural_order)
    # As in transformers, model.safetensors is the model, whatever other files there are: weights of
    # another format, adapters, the index of an earlier save.
    single = listing.single_file
    if single in listing.weights and single not in names:
        weight_map, names = {}, [single]
    if not names:
        names = known.choose(listing.path, listing.weights)
    files = []
    for name in names:
        with problems.noted():
            files.append(_weight_file(listing.folder, name, listing.index))
    return Selection(
        path=listing.path,
        format=known,
        files=tuple(files),
        weight_map=weight_map,
        config=config,
        ignored_files=tuple(name for name in listing.weights if name not in names),
    )


def _parse_object(path: Path, documents: Mapping[Path, bytes]) -> dict[str, Any]:
    try:
        parsed = json.loads(documents[path])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(parsed).__name__}, not an object: download it again."
        )
    return parsed


def _parse_weight_map(index: Path, documents: Mapping[Path, bytes]) -> Mapping[str, str]:
    weight_map = _parse_object(index, documents).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map that tells which file each tensor is in: download it again."
        )
    checked: set[str] = set()
    for tensor, name in weight_map.items():
        if type(name) is not str:
            raise CheckpointError(
                f"{index} places tensor {tensor!r} in {name!r:.80}, which is no file name: "
                "download it again."
            )
        if name not in checked and (
            not name or name[0] == "/" or ".." in PurePosixPath(name).parts
        ):
            raise CheckpointError(
                f"{index} places tensor {tensor!r} in {name!r}, outside its own folder: download "
                "it again, from a source that you trust."
            )
        checked.add(name)
    return weight_map


def _weight_file(folder: Path, name: str, index: Path | None) -> WeightFile:
    path = folder / name
    with translated_os_errors(path):
        try:
            status = path.stat()
        except FileNotFoundError as error:
            if index is None:
                raise
            raise CheckpointError(
                f"{path} is not there, but {index.name} names it: download it again."
            ) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file: replace it by one.")
    refuse_other_framework(path)
    return WeightFile(
        name=name, path=path, size_bytes=status.st_size, version=FileVersion.of(status)
    )
