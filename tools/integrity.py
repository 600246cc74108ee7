"""Compares the content of a checkpoint's files with the SHA-256 digests that are recorded of them, and records those of tensors."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.digests import (
    RECORD_FILE,
    FileDigests,
    FilePiece,
    hub_digest,
    parse_digests,
    pieces_of,
)

__all__ = [
    "FileCheck",
    "changes_of",
    "check_content",
    "digests_beside",
    "digests_of",
]

T = TypeVar("T")
R = TypeVar("R")

# Reads of this size are as fast as larger ones, and their overhead is small.
_CHUNK_BYTES = 4 << 20
# Hashing takes longer than reading from a fast disk, and both go on without the GIL.
_MAX_THREADS = 8

Progress = Callable[[int], Callable[[int], object]]
"""Takes the number of bytes to be read, and returns what is called with those of each read, in one thread at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """What is known of a file's content."""

    name: str
    """Relative to the model's folder."""
    size_bytes: int
    pieces: tuple[FilePiece, ...]
    """Those of which a digest is recorded: none, or all of the file."""
    problem: str | None = None
    """What is wrong with it, in a sentence; None if nothing was found."""

    @property
    def expected_sha256(self) -> str | None:
        """The digest of the whole file; None if there is none, or there are those of its tensors."""
        whole = len(self.pieces) == 1 and self.pieces[0].tensor is None
        return self.pieces[0].sha256 if whole else None


def digests_beside(checkpoint: Checkpoint) -> dict[str, FileDigests] | None:
    """The digests that were recorded in the model's folder; None without them."""
    record = _folder_of(checkpoint) / RECORD_FILE
    return parse_digests(record) if record.is_file() else None


def check_content(
    checkpoint: Checkpoint, digests: Mapping[str, FileDigests] | None, progress: Progress
) -> list[FileCheck]:
    """Read the files whose digests are recorded, and compare them.

    Args:
        checkpoint: The model.
        digests: By name; all weights must be among them, and with a folder, the other files are checked, too. None for what the hub recorded.
        progress: Shows how far it is.

    Returns:
        The weight files and the others in ``digests``, in order.
    """
    folder = _folder_of(checkpoint)
    checks = list(_expected(checkpoint, folder, digests))

    def checked(check: FileCheck, read: Callable[[int], None]) -> FileCheck:
        if check.problem is not None or not check.pieces:
            return check
        return replace(check, problem=_compare(folder / check.name, check.pieces, read))

    readable = [check for check in checks if check.pieces and check.problem is None]
    return _for_each(checks, checked, progress, sum(check.size_bytes for check in readable))


def digests_of(checkpoint: Checkpoint, progress: Progress) -> dict[str, FileDigests]:
    """Read all weight files, and return the digests of their tensors and of what lies between them, by name.

    Raises:
        OSError: A file cannot be read.
    """

    def digested(number: int, read: Callable[[int], None]) -> FileDigests:
        file = checkpoint.files[number]
        pieces = list(pieces_of(checkpoint, number))
        found = _read_pieces(file.path, pieces, read)
        return FileDigests(
            size_bytes=file.size_bytes,
            pieces=tuple(
                piece._replace(sha256=digest) for piece, digest in zip(pieces, found, strict=True)
            ),
        )

    total = sum(file.size_bytes for file in checkpoint.files)
    found = _for_each(range(len(checkpoint.files)), digested, progress, total)
    return {file.name: each for file, each in zip(checkpoint.files, found, strict=True)}


def changes_of(before: Mapping[str, FileDigests], now: Mapping[str, FileDigests]) -> list[str]:
    """What is different in ``now``: files and tensors that are gone, new, or of other content."""
    changes = [f"{name} is gone" for name in before if name not in now]
    for name, file in now.items():
        if name not in before:
            changes.append(f"{name} is new")
            continue
        changes += [f"{name} {change}" for change in _changes(before[name].pieces, file.pieces)]
    return changes


def _changes(before: Sequence[FilePiece], now: Sequence[FilePiece]) -> list[str]:
    """The same of one file."""
    recorded, found = (
        {
            piece.tensor or f"header at {piece.offset}": (piece.tensor, piece.nbytes, piece.sha256)
            for piece in pieces
        }
        for pieces in (before, now)
    )
    changes = [
        f"has other bytes in {'its header' if tensor is None else f'tensor {tensor!r}'}"
        for name, (tensor, *_) in found.items()
        if recorded.get(name, found[name]) != found[name]
    ]
    changes += [f"has {name!r} in addition" for name in found if name not in recorded]
    changes += [f"has lost {name!r}" for name in recorded if name not in found]
    if not changes and tuple(before) != tuple(now):
        changes.append("has the same tensors in other places")
    return changes


def _for_each(
    items: Sequence[T],
    work: Callable[[T, Callable[[int], None]], R],
    progress: Progress,
    total: int,
) -> list[R]:
    advance, lock = progress(total), threading.Lock()

    def read(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda item: work(item, read), items))


def _folder_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _expected(
    checkpoint: Checkpoint, folder: Path, digests: Mapping[str, FileDigests] | None
) -> Iterator[FileCheck]:
    for file in checkpoint.files:
        if digests is None:
            digest = hub_digest(folder, file.name)
            pieces = () if digest is None else (FilePiece(0, file.size_bytes, None, digest),)
            yield FileCheck(name=file.name, size_bytes=file.size_bytes, pieces=pieces)
        elif file.name in digests:
            yield _check_of(file.name, file.path, digests[file.name])
        else:
            yield FileCheck(
                name=file.name,
                size_bytes=file.size_bytes,
                pieces=(),
                problem=f"{file.path} has no digest in the file of digests.",
            )
    if digests is None or folder != checkpoint.path:
        return
    for name in sorted(digests.keys() - {file.name for file in checkpoint.files}):
        yield _check_of(name, folder / name, digests[name])


def _check_of(name: str, path: Path, digests: FileDigests) -> FileCheck:
    there = path.is_file()
    size = path.stat().st_size if there else 0
    problem = None if there else f"{path} is not there: download it again."
    pieces = digests.pieces
    if digests.size_bytes is None:
        pieces = (pieces[0]._replace(nbytes=size),)
    elif there and digests.size_bytes != size:
        problem = f"{path} has {size:,} bytes, and {digests.size_bytes:,} when its digests were recorded: download it again."
    return FileCheck(name=name, size_bytes=size, pieces=pieces, problem=problem)


def _compare(path: Path, pieces: Sequence[FilePiece], read: Callable[[int], None]) -> str | None:
    """Return what is wrong with the content of ``path``."""
    try:
        for piece, digest in zip(pieces, _read_pieces(path, pieces, read), strict=True):
            if digest != piece.sha256:
                return f"{piece.corrupt(path, digest)}."
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}; check the disk."
    return None


def _read_pieces(
    path: Path, pieces: Sequence[FilePiece], read: Callable[[int], None]
) -> Iterator[str]:
    """The digests of the pieces of ``path``, which follow one another and are all of it."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as stream:
        # What the disk holds is to be checked, not a copy that is still in memory from the download.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for piece in pieces:
            digest, left = hashlib.sha256(), piece.nbytes
            while left and (count := stream.readinto(buffer[: min(left, _CHUNK_BYTES)])):
                digest.update(buffer[:count])
                left -= count
                read(count)
            yield digest.hexdigest()
