"""Recorded SHA-256 digests of weight files: of whole files, as the hub and ``sha256sum`` have them, or of every tensor.

A file that ``layerstream verify --record`` wrote has a digest for every tensor, and for what lies between them (headers), so that
an error can name the tensor, and a layer batch be checked without the rest of its file.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import first_names

__all__ = [
    "RECORD_FILE",
    "FileDigests",
    "FilePiece",
    "hub_digest",
    "parse_digests",
    "pieces_of",
    "recorded_digests",
    "to_record",
]

RECORD_FILE = "layerstream.sha256"
"""What ``layerstream verify --record`` writes into the model's folder."""

_VERSION = 1
_NAMED = 4  # files in an error
_DIGEST = re.compile("[0-9a-f]{64}")
_DIGEST_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")


class FilePiece(NamedTuple):
    """Some bytes of a file, and their digest."""

    offset: int
    nbytes: int
    tensor: str | None
    """The tensor that they are, or belong to; None for a header, or a whole file."""
    sha256: str = ""

    def corrupt(self, path: Path, found: str) -> str:
        """What is wrong with it in ``path``, if its digest is ``found``."""
        what = f"tensor {self.tensor!r}, " if self.tensor is not None else ""
        return (
            f"{path} is corrupt: {what}{self.nbytes:,} bytes at offset {self.offset:,}, has the SHA-256 {found}, and "
            f"{self.sha256} is recorded; download the file again"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigests:
    """The digests of one file: its pieces cover it, and follow one another."""

    size_bytes: int | None
    """None if that is not recorded."""
    pieces: tuple[FilePiece, ...]


def parse_digests(path: Path) -> dict[str, FileDigests]:
    """Read what ``sha256sum`` or ``layerstream verify --record`` wrote; returns digests by the names of files.

    Raises:
        CheckpointError: It cannot be read, is no such file, or names files outside the model's folder.
    """
    try:
        text = path.read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; check the path."
        ) from error
    if text.startswith("{"):
        return _parse_record(path, text)
    digests = {}
    for number, line in enumerate(text.splitlines(), start=1):
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
        name = _inside(name, f"{path}, line {number}")
        digests[name] = FileDigests(
            size_bytes=None, pieces=(FilePiece(0, 0, None, digest.lower()),)
        )
    return digests


def _parse_record(path: Path, text: str) -> dict[str, FileDigests]:
    try:
        record = json.loads(text)
        if record["version"] != _VERSION:
            raise CheckpointError(
                f"{path} was written by another version of layerstream: record the digests again."
            )
        return {
            _inside(name, str(path)): _whole_file(
                int(file["size_bytes"]), [_piece(*each) for each in file["pieces"]]
            )
            for name, file in record["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not what `layerstream verify --record` writes ({error}): record the digests again."
        ) from error


def _whole_file(size_bytes: int, pieces: Sequence[FilePiece]) -> FileDigests:
    end = 0
    for piece in pieces:
        if piece.offset != end or piece.nbytes < 0:
            raise ValueError(f"no digest covers byte {end}")
        end += piece.nbytes
    if end != size_bytes:
        raise ValueError(f"digests cover {end} of {size_bytes} bytes")
    return FileDigests(size_bytes=size_bytes, pieces=tuple(pieces))


def _piece(offset: int, nbytes: int, tensor: str | None, sha256: str) -> FilePiece:
    if not _DIGEST.fullmatch(sha256):
        raise ValueError(f"{sha256!r:.80} is no digest")
    return FilePiece(int(offset), int(nbytes), tensor, sha256)


def to_record(files: Mapping[str, FileDigests]) -> str:
    """The text of a file of digests of tensors."""
    content: dict[str, Any] = {
        name: {"size_bytes": file.size_bytes, "pieces": [list(each) for each in file.pieces]}
        for name, file in files.items()
    }
    return json.dumps({"version": _VERSION, "files": content}, ensure_ascii=False) + "\n"


def _inside(name: str, where: str) -> str:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(
            f"{where}, names {name!r}, which is not in the model's folder: name files relative to that."
        )
    return str(relative)


def hub_digest(folder: Path, name: str) -> str | None:
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


def recorded_digests(checkpoint: Checkpoint, digests: Path | None = None) -> dict[str, FileDigests]:
    """The digests of all weight files, by name: of ``digests``, else of the file in the model's folder, else the hub's.

    Raises:
        CheckpointError: There are none of some file, which is named, or they are those of a file of another size.
    """
    path = checkpoint.path
    folder = path if path.is_dir() else path.parent
    given = folder / RECORD_FILE if digests is None else digests
    recorded = parse_digests(given) if digests is not None or given.is_file() else {}
    found = {}
    for file in checkpoint.files:
        known = recorded.get(file.name)
        if known is None and digests is None and (digest := hub_digest(folder, file.name)):
            known = FileDigests(size_bytes=None, pieces=(FilePiece(0, 0, None, digest),))
        if known is None:
            continue
        if known.size_bytes not in (None, file.size_bytes):
            raise CheckpointError(
                f"{file.path} has {file.size_bytes:,} bytes, and {known.size_bytes:,} when its digests were recorded in "
                f"{given}: download it again, or record them anew."
            )
        if known.size_bytes is None:
            known = FileDigests(
                size_bytes=file.size_bytes,
                pieces=(known.pieces[0]._replace(nbytes=file.size_bytes),),
            )
        found[file.name] = known
    if missing := [file.name for file in checkpoint.files if file.name not in found]:
        raise CheckpointError(
            f"{path} cannot be verified: no SHA-256 digest is recorded of {first_names(missing, _NAMED)}; record them of files that "
            "are known to be good (layerstream verify --record), or open the model without verify."
        )
    return found


def pieces_of(checkpoint: Checkpoint, file: int) -> Iterator[FilePiece]:
    """The tensors of a file and what lies between them, in order: each byte of it once, without digests."""
    size = checkpoint.files[file].size_bytes
    tensors = sorted(
        (info.offset, info.offset + info.nbytes, info.name)
        for info in checkpoint.tensors.values()
        if info.file == file and info.nbytes
    )
    at = 0
    for start, stop, name in tensors:  # those of torch.save may lie in one another
        if start > at:
            yield FilePiece(at, start - at, None)
        if stop > (start := max(start, at)):
            yield FilePiece(start, stop - start, name)
            at = stop
    if at < size:
        yield FilePiece(at, size - at, None)
