"""What of a conversion is done: a file in the folder that is written, by which an interrupted one goes on."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from layerstream.stages.errors import CheckpointError
from layerstream.tools.convert.shard_file import LayerError

__all__ = ["JOURNAL", "PARTIAL", "FinishedShard", "Journal", "locked", "write_durably"]

JOURNAL = "layerstream-convert.json"
PARTIAL = ".partial"
"""Suffix of the names of files until all of them are complete, so that part of a model never looks like a model."""


class FinishedShard(NamedTuple):
    """A file that was written to its end."""

    checksum: int
    errors: dict[str, LayerError]
    """By layer."""


class Journal:
    """The finished files of one conversion.

    Args:
        folder: Where the result is written.
        job: Everything that determines the result's bytes, as JSON data.
        files: The names of all files that the conversion writes.

    Raises:
        CheckpointError: The folder holds other files, or those of another conversion.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], files: frozenset[str]) -> None:
        self._folder = folder
        self._job = dict(job)
        self._files = files
        self.finished = self._load()

    def add(self, name: str, shard: FinishedShard) -> None:
        """Note that the file ``name`` is finished. It has to be on the disk."""
        self.finished[name] = shard
        self.save()

    def save(self) -> None:
        """Write the journal, as a whole or not at all."""
        content = {"job": self._job, "finished": self.finished}
        write_durably(self._folder / JOURNAL, json.dumps(content, indent=1).encode())

    def remove(self) -> None:
        """Remove the journal: the result is complete."""
        (self._folder / JOURNAL).unlink()

    def _load(self) -> dict[str, FinishedShard]:
        folder = self._folder
        if not folder.exists():
            return {}
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; give a new or empty folder.")
        names = {path.name for path in folder.iterdir()} - {JOURNAL + PARTIAL}
        if JOURNAL not in names:
            if names:
                raise CheckpointError(
                    f"{folder} holds other files, such as {min(names)}, and nothing is overwritten; give a new or empty "
                    "folder."
                )
            return {}
        try:
            content = json.loads((folder / JOURNAL).read_bytes())
            job = dict(content["job"])
            finished = {
                name: FinishedShard(
                    int(checksum),
                    {layer: LayerError(*map(float, pair)) for layer, pair in errors.items()},
                )
                for name, (checksum, errors) in content["finished"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / JOURNAL} is damaged ({error}); remove {folder} to convert anew, or give another folder."
            ) from error
        self._refuse_others(job, names)
        return finished

    def _refuse_others(self, job: Mapping[str, Any], names: set[str]) -> None:
        changed = [key for key in self._job if job.get(key) != self._job[key]]
        if changed:
            raise CheckpointError(
                f"{self._folder} holds an unfinished conversion of another kind ({', '.join(changed)} differ); give the "
                f"arguments that it was begun with, give another folder, or remove {self._folder}."
            )
        foreign = names - self._files - {f"{name}{PARTIAL}" for name in self._files} - {JOURNAL}
        if foreign:
            raise CheckpointError(
                f"{self._folder} holds an unfinished conversion and other files, such as {min(foreign)}; move these away, or "
                "give another folder."
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from converting into ``folder``, which exists, while the block runs.

    Raises:
        CheckpointError: One does.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"Another process is converting into {folder}; wait for it, or give another folder."
            ) from None
        yield
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
