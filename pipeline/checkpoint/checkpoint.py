"""A checkpoint as it was downloaded: its files, and the place of each tensor in them.

Only headers, the index and config.json are read, never weights. The blocking and the async way of opening differ only
in how they read; both use the same functions to interpret the bytes.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import aiofiles

from layerstream.pipeline.checkpoint.files import (
    Selection,
    list_files,
    select_files,
    translated_os_errors,
)
from layerstream.pipeline.checkpoint.formats.format import (
    ByteRange,
    Header,
    HeaderReader,
    TensorInfo,
    WeightFile,
)
from layerstream.pipeline.checkpoint.formats.registry import read_header
from layerstream.pipeline.checkpoint.weight_choice import ANY_WEIGHTS, WeightChoice
from layerstream.stages.errors import CheckpointError
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["Checkpoint", "TensorInfo", "WeightFile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weight files of a model and every tensor in them, validated."""

    path: Path
    """The folder or file that was opened, absolute."""
    files: tuple[WeightFile, ...]
    """In natural order; ``TensorInfo.file`` is an index into it."""
    tensors: Mapping[str, TensorInfo]
    """By name, in the order of files and offsets."""
    config: Mapping[str, Any] | None
    """What the weight files themselves say of the model, if they do, else the config.json of the folder, also if a
    single file was opened; None without one.
    """
    format: str = "safetensors"
    """The name of the files' format."""
    ignored_files: tuple[str, ...] = ()
    """Names of weight files in the folder that are not part of the model."""

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors together, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        choice: WeightChoice = ANY_WEIGHTS,
        *,
        guard: ReadGuard | None = None,
    ) -> Self:
        """Read the headers of a folder of safetensors shards, or of one safetensors file.

        Args:
            path: The folder or the file.
            choice: Which weights are wanted, if the folder holds several.
            guard: Watches over the reads.

        Raises:
            CheckpointError: Files are missing, truncated, corrupt or contradict one another.
        """
        watching = _unwatched if guard is None else guard.watching
        with watching(Path(path), 0):
            listing = list_files(Path(path), choice)
        documents = {path: _read_document(path, watching) for path in listing.documents}
        with watching(listing.folder, 0):
            selection = select_files(listing, documents)
        headers = [
            _read_header(file, number, watching) for number, file in enumerate(selection.files)
        ]
        return cls._from_headers(selection, headers)

    @classmethod
    async def open_async(cls, path: str | os.PathLike[str]) -> Self:
        """The same as ``open``, without blocking the event loop."""
        listing = await asyncio.to_thread(list_files, Path(path))
        documents = {path: await _read_document_async(path) for path in listing.documents}
        selection = await asyncio.to_thread(select_files, listing, documents)
        headers = [
            await _read_header_async(file, number) for number, file in enumerate(selection.files)
        ]
        return await asyncio.to_thread(cls._from_headers, selection, headers)

    @classmethod
    def _from_headers(cls, selection: Selection, headers: Sequence[Header]) -> Self:
        _check_parts(selection, headers)
        tensors_by_file = [header.tensors for header in headers]
        _remove_duplicates(selection, tensors_by_file)
        tensors = {name: info for table in tensors_by_file for name, info in table.items()}
        _check_weight_map(selection, tensors)
        if not tensors:
            raise CheckpointError(f"{selection.path} holds no tensors: download the model again.")
        return cls(
            path=selection.path,
            files=selection.files,
            tensors=tensors,
            config=headers[0].config or selection.config,
            format=selection.format.name,
            ignored_files=selection.ignored_files,
        )


def _check_parts(selection: Selection, headers: Sequence[Header]) -> None:
    """Refuse files that say themselves that others belong to them, unless these are all there."""
    for number, (file, header) in enumerate(zip(selection.files, headers, strict=True)):
        if header.part and header.part != (number, len(headers)):
            own, count = header.part
            raise CheckpointError(
                f"{file.path} says that it is part {own + 1} of {count}, and was found as part "
                f"{number + 1} of {len(headers)}: give all parts the names that they were downloaded "
                "with, in one folder."
            )


def _remove_duplicates(selection: Selection, tensors_by_file: list[dict[str, TensorInfo]]) -> None:
    """If two files have a tensor of the same name, keep the one that the index names."""
    file_numbers: dict[str, int] = {}
    for number, table in enumerate(tensors_by_file):
        for name in table.keys() & file_numbers.keys():
            first, second = (selection.files[at] for at in (file_numbers[name], number))
            keep = selection.weight_map.get(name)
            if keep is None:
                raise CheckpointError(
                    f"{selection.path}: tensor {name!r} is in {first.name} and in {second.name}, "
                    "and no index tells which one counts; open one of these files instead of the "
                    "folder, or move the other one away."
                )
            if keep == second.name:
                del tensors_by_file[file_numbers[name]][name]
            else:
                del table[name]
        file_numbers.update(dict.fromkeys(table, number))


def _check_weight_map(selection: Selection, tensors: Mapping[str, TensorInfo]) -> None:
    numbers = {file.name: number for number, file in enumerate(selection.files)}
    for name, file in selection.weight_map.items():
        info = tensors.get(name)
        if info is None or info.file != numbers[file]:
            found = f"; it is in {selection.files[info.file].name}" if info else ""
            raise CheckpointError(
                f"{selection.path}: the index places tensor {name!r} in {file}, which lacks it"
                f"{found}; index and weights are of different versions, download both again."
            )


# Watches over a read of a path at an offset.
_Watching = Callable[[Path, int], AbstractContextManager[None]]


def _unwatched(_path: Path, _offset: int) -> AbstractContextManager[None]:
    return nullcontext()


def _read_document(path: Path, watching: _Watching) -> bytes:
    with translated_os_errors(path), watching(path, 0):
        return path.read_bytes()


async def _read_document_async(path: Path) -> bytes:
    with translated_os_errors(path):
        async with aiofiles.open(path, "rb") as stream:
            return await stream.read()


def _read_header(file: WeightFile, number: int, watching: _Watching) -> Header:
    with translated_os_errors(file.path), ExitStack() as opened:
        with watching(file.path, 0):
            stream = opened.enter_context(file.path.open("rb"))
        reader = read_header(file, number)
        asked = _advance(reader, None)
        while isinstance(asked, ByteRange):
            with watching(file.path, asked.offset):
                stream.seek(asked.offset)
                content = stream.read(asked.length)
            asked = _advance(reader, content)
        return asked


async def _read_header_async(file: WeightFile, number: int) -> Header:
    with translated_os_errors(file.path):
        async with aiofiles.open(file.path, "rb") as stream:
            reader = read_header(file, number)
            asked = _advance(reader, None)
            while isinstance(asked, ByteRange):
                await stream.seek(asked.offset)
                content = await stream.read(asked.length)
                # Headers of 100 MB take seconds to parse.
                asked = await asyncio.to_thread(_advance, reader, content)
            return asked


def _advance(reader: HeaderReader, content: bytes | None) -> ByteRange | Header:
    """Give a reader the bytes that it asked for; returns what it asks for next, or what it has found."""
    try:
        return next(reader) if content is None else reader.send(content)
    except StopIteration as result:
        return cast("Header", result.value)
