"""A checkpoint as it was downloaded: its files, and the place of each tensor in them.

Only headers, the index and config.json are read, never weights. The blocking and the async way of opening differ only
in how they read; both use the same functions to interpret the bytes.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast

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
from layerstream.pipeline.checkpoint.problems import Problems
from layerstream.pipeline.checkpoint.weight_choice import ANY_WEIGHTS, WeightChoice
from layerstream.stages.errors import CheckpointError
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["Checkpoint", "TensorInfo", "WeightFile"]

T = TypeVar("T")


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
        with ExitStack() as ending:
            if guard is None:
                guard = ReadGuard()
                ending.callback(guard.close)
            with guard.watching(Path(path)):
                listing = list_files(Path(path), choice)
            documents = {path: _read_document(path, guard) for path in listing.documents}
            problems, headers = Problems(), []
            with guard.watching(listing.folder):
                selection = select_files(listing, documents, problems)
            for number, file in enumerate(selection.files):
                with problems.noted():
                    headers.append(_read_header(file, number, guard))
            problems.raise_all(selection.path)
            return cls._from_headers(selection, headers)

    @classmethod
    async def open_async(cls, path: str | os.PathLike[str]) -> Self:
        """The same as ``open``, without blocking the event loop."""
        listing = await asyncio.to_thread(list_files, Path(path))
        documents = {path: await _read_document_async(path) for path in listing.documents}
        problems, headers = Problems(), []
        selection = await asyncio.to_thread(select_files, listing, documents, problems)
        for number, file in enumerate(selection.files):
            with problems.noted():
                headers.append(await _read_header_async(file, number))
        problems.raise_all(selection.path)
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


def _read_document(path: Path, guard: ReadGuard) -> bytes:
    with translated_os_errors(path):
        return guard.run(path.read_bytes, path=path)


async def _read_document_async(path: Path) -> bytes:
    async def read() -> bytes:
        async with aiofiles.open(path, "rb") as stream:
            return await stream.read()

    with translated_os_errors(path):
        return await _repeated(read, path)


def _read_header(file: WeightFile, number: int, guard: ReadGuard) -> Header:
    with translated_os_errors(file.path), ExitStack() as opened:
        stream = guard.run(lambda: file.path.open("rb"), path=file.path)
        opened.enter_context(stream)

        def read(asked: ByteRange) -> bytes:
            stream.seek(asked.offset)
            return stream.read(asked.length)

        reader = read_header(file, number)
        asked = _advance(reader, None)
        while isinstance(asked, ByteRange):
            content = guard.run(partial(read, asked), path=file.path, offset=asked.offset)
            asked = _advance(reader, content)
        return asked


async def _read_header_async(file: WeightFile, number: int) -> Header:
    with translated_os_errors(file.path):
        async with AsyncExitStack() as opened:
            stream = await _repeated(lambda: aiofiles.open(file.path, "rb"), file.path)
            opened.push_async_callback(stream.close)

            async def read(asked: ByteRange) -> bytes:
                await stream.seek(asked.offset)
                return await stream.read(asked.length)

            reader = read_header(file, number)
            asked = _advance(reader, None)
            while isinstance(asked, ByteRange):
                content = await _repeated(partial(read, asked), file.path, asked.offset)
                # Headers of 100 MB take seconds to parse.
                asked = await asyncio.to_thread(_advance, reader, content)
            return asked


async def _repeated(read: Callable[[], Awaitable[T]], path: Path, offset: int = 0) -> T:
    """What ``read`` returns, at the latest at its fourth attempt, as in ``ReadGuard.run``."""
    guard, attempt = ReadGuard(), 1
    while True:
        try:
            return await read()
        except OSError as error:
            pause = guard.pause_seconds(error, attempt, path=path, offset=offset)
            if pause is None:
                raise
        attempt += 1
        await asyncio.sleep(pause)


def _advance(reader: HeaderReader, content: bytes | None) -> ByteRange | Header:
    """Give a reader the bytes that it asked for; returns what it asks for next, or what it has found."""
    try:
        return next(reader) if content is None else reader.send(content)
    except StopIteration as result:
        return cast("Header", result.value)
