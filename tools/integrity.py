"""Compares the content of a checkpoint's files with the SHA-256 digests that are recorded of them."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.stages.errors import CheckpointError

__all__ = ["FileCheck", "check_content", "parse_digests", "recorded_digest"]

_DIGEST = re.compile("[0-9a-f]{64}")
_DIGEST_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")

# Reads of this size are as fast as larger ones, and their overhead is small.
_CHUNK_BYTES = 4 << 20
# Hashing takes longer than reading from a fast disk, and both go on without the GIL.
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """What is known of a file's content."""

    name: str
    """Relative to the model's folder."""
    size_bytes: int
    expected_sha256: str | None
    """The digest that is recorded of it; None without one."""
    problem: str | None = None
    """What is wrong with it, in a sentence; None if nothing was found."""


def parse_digests(path: Path) -> dict[str, str]:
    """Read a file as ``sha256sum`` writes it; returns the digests of files by their names.

    Raises:
        CheckpointError: It is no such file, or names files outside the model's folder.
    """
    digests = {}
    for number, line in enumerate(path.read_text("utf-8", "surrogateescape").splitlines(), start=1):
        if not line.strip():
            continue
        match = _DIGEST_LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(
                f"{path}, line {number}, is not 'DIGEST  NAME' as sha256sum writes it: correct it."
            )
        escaped, digest, name = match.groups()
        if escaped:
            name = re.sub(
                r"\\(.)", lambda found: {"n": "\n", "r": "\r"}.get(found[1], found[1]), name
            )
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(
                f"{path}, line {number}, names {name!r}, which is not in the model's folder: name files relative to that."
            )
        digests[str(relative)] = digest.lower()
    return digests


def recorded_digest(folder: Path, name: str) -> str | None:
    """The SHA-256 of a file that huggingface_hub downloaded, as the hub gave it; None if it is not known.

    A file in the hub's cache is a link to one that is named by its digest, and one in a folder of its own has metadata beside it:
    the commit, the digest, and the time. (Small files have a digest of git's there, which is not SHA-256.)
    """
    target = (folder / name).resolve()
    if target.parent.name == "blobs" and _DIGEST.fullmatch(target.name):
        return target.name
    metadata = folder / ".cache/huggingface/download" / f"{name}.metadata"
    try:
        lines = metadata.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return lines[1] if len(lines) > 1 and _DIGEST.fullmatch(lines[1]) else None


def check_content(
    checkpoint: Checkpoint,
    digests: Mapping[str, str] | None,
    progress: Callable[[int], Callable[[int], object]],
) -> list[FileCheck]:
    """Read the files whose digests are recorded, and compare them.

    Args:
        checkpoint: The model.
        digests: By name; all weights must be among them, and with a folder, the other files are checked, too. None for what the hub recorded.
        progress: Takes the number of bytes to be read, and returns what is called with those of each read, in one thread at a time.

    Returns:
        The weight files and the others in ``digests``, in order.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    checks = list(_expected(checkpoint, folder, digests))
    readable = [check for check in checks if check.expected_sha256 and check.problem is None]
    advance = progress(sum(check.size_bytes for check in readable))
    lock = threading.Lock()

    def read(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    def checked(check: FileCheck) -> FileCheck:
        problem = _compare(folder / check.name, check, read) if check in readable else check.problem
        return FileCheck(
            name=check.name,
            size_bytes=check.size_bytes,
            expected_sha256=check.expected_sha256,
            problem=problem,
        )

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(checked, checks))


def _expected(
    checkpoint: Checkpoint, folder: Path, digests: Mapping[str, str] | None
) -> Iterator[FileCheck]:
    for file in checkpoint.files:
        digest = recorded_digest(folder, file.name) if digests is None else digests.get(file.name)
        missing = digests is not None and digest is None
        yield FileCheck(
            name=file.name,
            size_bytes=file.size_bytes,
            expected_sha256=digest,
            problem=f"{file.path} has no digest in the file of digests." if missing else None,
        )
    if digests is None or folder != checkpoint.path:
        return
    for name in sorted(digests.keys() - {file.name for file in checkpoint.files}):
        path = folder / name
        there = path.is_file()
        yield FileCheck(
            name=name,
            size_bytes=path.stat().st_size if there else 0,
            expected_sha256=digests[name],
            problem=None if there else f"{path} is not there: download it again.",
        )


def _compare(path: Path, check: FileCheck, read: Callable[[int], None]) -> str | None:
    """Return what is wrong with the content of ``path``."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    done = 0
    try:
        with path.open("rb", buffering=0) as stream:
            # What the disk holds is to be checked, not a copy that is still in memory from the download.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                read(count)
    except OSError as error:
        return f"{path} cannot be read at byte {done:,}: {error.strerror}; check the disk."
    if digest.hexdigest() == check.expected_sha256:
        return None
    return (
        f"{path} is corrupt: its SHA-256 is {digest.hexdigest()}, and {check.expected_sha256} is recorded; "
        "download it again."
    )
