"""The directory of a zip archive whose entries are stored as they are. No I/O: generators ask for bytes."""

import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NoReturn

from layerstream.pipeline.checkpoint.formats.format import ByteRange, WeightFile, quoted
from layerstream.stages.errors import CheckpointError

__all__ = ["Entry", "content_of", "read_directory", "refuse"]

_END, _END_64, _LOCATOR, _CENTRAL, _LOCAL = (
    b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
)  # fmt: skip
_END_FIELDS = struct.Struct("<4s4HIIH")
_LOCATOR_FIELDS = struct.Struct("<4sIQI")
_END_64_FIELDS = struct.Struct("<4sQHHIIQQQQ")
_CENTRAL_FIELDS = struct.Struct("<4s6H3I5H2I")
_LOCAL_FIELDS = struct.Struct("<4s5H3I2H")
_EXTRA_FIELDS = struct.Struct("<HH")
_ZIP64 = 0x0001
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1 | 32 | 64 | 8192  # or patches of others
_FOLDER = 0x10
_MAX_COMMENT_BYTES = 0xFFFF
_MAX_DIRECTORY_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file in the archive."""

    name: str
    nbytes: int
    header_offset: int
    """Of its own header, which its content follows."""


def read_directory(file: WeightFile) -> Generator[ByteRange, bytes, dict[str, Entry]]:
    """Return the entries of an archive by name, in the order of its directory.

    Raises:
        CheckpointError: It is no archive, is damaged, or has entries that are compressed or encrypted.
    """
    length = min(file.size_bytes, _END_FIELDS.size + _MAX_COMMENT_BYTES + _LOCATOR_FIELDS.size)
    tail = yield ByteRange(offset=file.size_bytes - length, length=length)
    at = tail.rfind(_END, 0, len(tail) - _END_FIELDS.size + len(_END))
    if at < 0:
        refuse(file, "has no directory at its end, so that it is truncated, or no zip archive")
    _, disk, first_disk, count_here, count, size, offset, _ = _END_FIELDS.unpack_from(tail, at)
    if disk != first_disk or disk not in {0, 1} or count_here != count:
        refuse(file, "is one part of a zip archive in several")
    if count == _FULL_16 or _FULL_32 in {size, offset}:
        found = at - _LOCATOR_FIELDS.size
        if found < 0 or tail[found : found + 4] != _LOCATOR:
            refuse(file, "has no directory for a large archive")
        _, _, place, _ = _LOCATOR_FIELDS.unpack_from(tail, found)
        if place > file.size_bytes:
            refuse(file, "has its directory behind its end")
        fields = yield ByteRange(offset=place, length=_END_64_FIELDS.size)
        if len(fields) < _END_64_FIELDS.size or fields[:4] != _END_64:
            refuse(file, "has no directory for a large archive")
        count, size, offset = _END_64_FIELDS.unpack(fields)[-3:]
    if size > _MAX_DIRECTORY_BYTES or offset + size > file.size_bytes:
        refuse(file, f"has a directory of {size:,} bytes at byte {offset:,}, which does not fit")
    content = yield ByteRange(offset=offset, length=size)
    return _entries(content, count, file)


def content_of(entry: Entry, file: WeightFile) -> Generator[ByteRange, bytes, int]:
    """Return where the content of an entry starts in the file, as its own header says."""
    name = entry.name.encode()
    header = yield ByteRange(offset=entry.header_offset, length=_LOCAL_FIELDS.size + len(name))
    if len(header) < _LOCAL_FIELDS.size + len(name) or header[:4] != _LOCAL:
        refuse(file, f"has no entry {quoted(entry.name)} where its directory says")
    name_length, extra_length = map(int, _LOCAL_FIELDS.unpack_from(header)[-2:])
    if header[_LOCAL_FIELDS.size :] != name or name_length != len(name):
        refuse(file, f"has another entry where its directory says {quoted(entry.name)}")
    start = entry.header_offset + _LOCAL_FIELDS.size + name_length + extra_length
    if start + entry.nbytes > file.size_bytes:
        refuse(file, f"is truncated within its entry {quoted(entry.name)}")
    return start


def _entries(content: bytes, count: int, file: WeightFile) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        if content[at : at + 4] != _CENTRAL or len(content) < at + _CENTRAL_FIELDS.size:
            refuse(file, f"has a damaged directory, after {len(entries):,} of {count:,} entries")
        fields = _CENTRAL_FIELDS.unpack_from(content, at)
        flags, method, packed, nbytes = fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, disk = fields[10:14]
        attributes, offset = fields[15:17]
        at += _CENTRAL_FIELDS.size
        try:
            name = content[at : at + name_length].decode("utf-8")
        except UnicodeDecodeError:
            refuse(file, "has an entry whose name is not UTF-8")
        at += name_length
        extra = content[at : at + extra_length]
        nbytes, packed, offset = _large(extra, (nbytes, packed, offset), name, file)
        at += extra_length + comment_length
        if method or flags & _ENCRYPTED or packed != nbytes:
            refuse(
                file,
                f"has an entry {quoted(name)} that is compressed or encrypted",
                "write it again with torch.save",
            )
        if attributes & _FOLDER:
            refuse(file, f"has a folder {quoted(name)} in the place of a file")
        if disk not in {0, 1}:
            refuse(file, "is one part of a zip archive in several")
        if offset + nbytes > file.size_bytes:
            refuse(file, f"is truncated before its entry {quoted(name)}")
        if name in entries:
            refuse(file, f"has two entries {quoted(name)}")
        entries[name] = Entry(name=name, nbytes=nbytes, header_offset=offset)
    if at > len(content):
        refuse(file, "has a damaged directory")
    return entries


def _large(
    extra: bytes, numbers: tuple[int, int, int], name: str, file: WeightFile
) -> tuple[int, int, int]:
    """The three numbers of an entry, those that do not fit into 32 bits from its extra field."""
    if _FULL_32 not in numbers:
        return numbers
    at = 0
    while at + _EXTRA_FIELDS.size <= len(extra):
        kind, length = _EXTRA_FIELDS.unpack_from(extra, at)
        at += _EXTRA_FIELDS.size
        if kind == _ZIP64:
            large = [
                value for (value,) in struct.iter_unpack("<Q", extra[at : at + length // 8 * 8])
            ]
            if len(large) >= numbers.count(_FULL_32):
                found: Any = (large.pop(0) if each == _FULL_32 else each for each in numbers)
                return tuple(found)
        at += length
    return refuse(file, f"has no sizes for its large entry {quoted(name)}")


def refuse(file: WeightFile, fault: str, remedy: str = "download it again") -> NoReturn:
    """Raise a CheckpointError: ``fault`` is what is wrong with ``file``, ``remedy`` what to do."""
    raise CheckpointError(f"{file.path} {fault}: {remedy}.")
