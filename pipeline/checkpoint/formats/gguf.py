"""Parses and validates the header of a GGUF file, versions 2 and 3.

The format, all little-endian: "GGUF", the version, the numbers of tensors and of metadata values; the values, each with
a name and a type; each tensor's name, sizes (fastest first), type and offset; padding; the data. Vocabularies are
metadata, so headers take megabytes: they are walked over, not taken apart.
"""

import math
import struct
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from layerstream.pipeline.checkpoint.formats.format import (
    BLOCKS,
    ByteRange,
    Format,
    Header,
    HeaderReader,
    TensorInfo,
    WeightFile,
    quoted,
)
from layerstream.pipeline.checkpoint.formats.gguf_config import config_of, part_of
from layerstream.pipeline.checkpoint.formats.gguf_files import choose_files
from layerstream.pipeline.checkpoint.formats.gguf_types import DTYPES, ENCODINGS, REFUSED
from layerstream.stages.errors import CheckpointError

__all__ = ["GGUF"]

# Vocabularies of 256,000 tokens with their merges take 10 MB; more than this is no header.
_MAX_HEADER_BYTES = 256 << 20
_FIRST_READ_BYTES = 1 << 20
_VERSIONS = (2, 3)
_START = struct.Struct("<4sIQQ")
_LENGTH = struct.Struct("<Q")
_TYPE = struct.Struct("<I")
_MAX_NAME_BYTES = 65_535
_MAX_DIMENSIONS = 4  # ggml's own limit
_MAX_NESTING = 4
_MAX_NUMBER = 2**60  # torch's sizes are signed 64-bit integers, and sizes in bits must fit as well
_DEFAULT_ALIGNMENT = 32

# The smallest possible value (a name of no bytes, a type, one byte) and tensor.
_MIN_VALUE_BYTES, _MIN_TENSOR_BYTES = 13, 24

_SCALARS = {
    number: struct.Struct(f"<{code}")
    for number, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
    }.items()
}  # fmt: skip
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Arrays of numbers up to this length are values per layer, and decoded; longer ones belong to the vocabulary.
_MAX_DECODED = 4096


class _Short(Exception):  # noqa: N818 - no error: more of the file must be read
    """The header goes on behind the bytes that there are."""


class _Array(NamedTuple):
    """An array of the metadata whose values were skipped."""

    length: int


def _read_header(file: WeightFile, number: int) -> HeaderReader:
    """See ``Format.read_header``."""
    content = b""
    length = _FIRST_READ_BYTES
    while True:
        content += yield ByteRange(offset=len(content), length=length - len(content))
        try:
            return _Parser(content, file).header(number)
        except _Short:
            if len(content) < length or length >= file.size_bytes:
                raise CheckpointError(
                    f"{file.path} is truncated within its header, at {file.size_bytes:,} bytes, or "
                    "is no GGUF file: download it again."
                ) from None
        length = min(4 * length, file.size_bytes)
        if length > _MAX_HEADER_BYTES:
            length = _MAX_HEADER_BYTES
            if len(content) >= length:
                raise CheckpointError(
                    f"{file.path} has a header of more than {_MAX_HEADER_BYTES:,} bytes: it is corrupt; "
                    "download it again."
                )


class _Parser:
    """Walks over the header's bytes; raises ``_Short`` where they end."""

    def __init__(self, content: bytes, file: WeightFile) -> None:
        self._content = content
        self._path = file.path
        self._size_bytes = file.size_bytes
        self._at = 0

    def header(self, number: int) -> Header:
        """Return what the whole header says."""
        magic, version, tensors, values = self._take(_START)
        if magic != b"GGUF":
            self._refuse(
                "does not begin with GGUF", "it is no GGUF file; check it, or download it again"
            )
        if version & 0xFFFF == 0:
            self._refuse(
                "is a big-endian GGUF file", "convert the model for little-endian machines"
            )
        if version not in _VERSIONS:
            self._refuse(
                f"is of GGUF version {version}, where 2 and 3 are supported",
                "convert the model again with a current llama.cpp",
            )
        if tensors * _MIN_TENSOR_BYTES + values * _MIN_VALUE_BYTES > self._size_bytes:
            self._refuse(
                f"claims {tensors:,} tensors and {values:,} values, more than it has room for"
            )
        metadata = self._metadata(values)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"has general.alignment {quoted(alignment)}, which is no power of two")
        table = self._tensors(tensors, alignment, number)
        return Header(tensors=table, config=config_of(metadata, table), part=part_of(metadata))

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            name = self._name("a metadata value")
            if name in metadata:
                self._refuse(f"has metadata {quoted(name)} twice")
            (kind,) = self._take(_TYPE)
            if name == "general.alignment" and kind != _UINT32:
                self._refuse("has a general.alignment that is no unsigned 32-bit number")
            metadata[name] = self._value(kind, name, nesting=0)
        return metadata

    def _value(self, kind: int, name: str, *, nesting: int) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._bytes(self._length(name)).decode("utf-8", "replace")
        if kind != _ARRAY:
            self._refuse(f"has metadata {quoted(name)} of the unknown type {kind}")
        if nesting == _MAX_NESTING:
            self._refuse(f"has metadata {quoted(name)} of arrays in arrays in arrays")
        (kind,) = self._take(_TYPE)
        count = self._length(name)
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind], count)
        if kind == _STRING:
            self._skip_strings(count, name)
        else:
            for _ in range(count):
                self._value(kind, name, nesting=nesting + 1)
        return _Array(count)

    def _numbers(self, scalar: struct.Struct, count: int) -> Any:
        content = self._bytes(count * scalar.size)
        if count > _MAX_DECODED:
            return _Array(count)
        return [number for (number,) in scalar.iter_unpack(content)]

    def _skip_strings(self, count: int, name: str) -> None:
        # A vocabulary has hundreds of thousands: hence local names, and no calls of ours.
        content, at, end = self._content, self._at, len(self._content)
        unpack = _LENGTH.unpack_from
        with suppress(struct.error, OverflowError):
            for _ in range(count):
                at += 8 + unpack(content, at)[0]
            if at <= end:
                self._at = at
                return
        if at > self._size_bytes:
            self._refuse_length(name)
        raise _Short

    def _tensors(self, count: int, alignment: int, file: int) -> dict[str, TensorInfo]:
        rows = []
        for _ in range(count):
            name = self._name("a tensor")
            (dimensions,) = self._take(_TYPE)
            if dimensions > _MAX_DIMENSIONS:
                self._refuse_tensor(name, f"has {dimensions} dimensions, where 4 are allowed")
            sizes = self._take(struct.Struct(f"<{dimensions}Q"))
            (kind,) = self._take(_TYPE)
            (offset,) = self._take(_LENGTH)
            rows.append((offset, name, kind, sizes[::-1]))
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        end, before = start, ""
        for offset, name, kind, shape in sorted(rows, key=lambda row: row[0]):
            if name in tensors:
                self._refuse_tensor(name, "occurs twice")
            if offset % alignment:
                self._refuse_tensor(name, f"starts at byte {offset:,}, no multiple of {alignment}")
            info = self._tensor(name, kind, shape, offset=start + offset, file=file)
            if info.nbytes and info.offset < end:
                self._refuse_tensor(name, f"overlaps {quoted(before)}")
            if info.offset + info.nbytes > self._size_bytes:
                self._refuse_tensor(
                    name,
                    f"ends at byte {info.offset + info.nbytes:,} of a file of "
                    f"{self._size_bytes:,}, which is truncated",
                )
            if info.nbytes:
                end, before = info.offset + info.nbytes, name
            tensors[name] = info
        return tensors

    def _tensor(
        self, name: str, kind: int, shape: tuple[int, ...], *, offset: int, file: int
    ) -> TensorInfo:
        if math.prod(filter(None, shape)) > _MAX_NUMBER:
            self._refuse_tensor(name, "has a shape of more than 2**60 elements")
        encoding = ENCODINGS.get(kind)
        if encoding is not None:
            block = BLOCKS[encoding]
            if not shape or shape[-1] % block.values:
                columns = shape[-1] if shape else 1
                self._refuse_tensor(
                    name,
                    f"has rows of {columns:,} values, no multiple of {encoding}'s {block.values}",
                )
            shape = (*shape[:-1], shape[-1] // block.values * block.nbytes)
        elif kind not in DTYPES:
            self._refuse_tensor(
                name,
                f"is of type {REFUSED.get(kind, 'unknown')} (number {kind}), which cannot be unpacked",
                "take another quantisation of the model",
            )
        dtype, item_bytes = DTYPES.get(kind, ("uint8", 1))
        return TensorInfo(
            name=name,
            dtype=dtype,
            shape=shape,
            file=file,
            offset=offset,
            nbytes=math.prod(shape) * item_bytes,
            encoding=encoding,
        )

    def _name(self, whose: str) -> str:
        length = self._length(whose)
        if length > _MAX_NAME_BYTES:
            self._refuse(
                f"gives {whose} a name of {length:,} bytes, where {_MAX_NAME_BYTES:,} are allowed"
            )
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"gives {whose} a name that is not UTF-8")

    def _length(self, whose: str) -> int:
        (length,) = self._take(_LENGTH)
        if length > self._size_bytes:
            self._refuse_length(whose)
        return int(length)

    def _take(self, kind: struct.Struct) -> tuple[Any, ...]:
        try:
            values = kind.unpack_from(self._content, self._at)
        except struct.error:
            raise _Short from None
        self._at += kind.size
        return values

    def _bytes(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._content):
            if end > self._size_bytes:
                self._refuse_length("a value")
            raise _Short
        content = self._content[self._at : end]
        self._at = end
        return content

    def _refuse_length(self, whose: str) -> NoReturn:
        self._refuse(f"is truncated, or gives {quoted(whose)} a length that exceeds the file")

    def _refuse_tensor(
        self, name: str, fault: str, remedy: str = "it is corrupt; download it again"
    ) -> NoReturn:
        raise CheckpointError(f"{self._path}: tensor {quoted(name)} {fault}: {remedy}.")

    def _refuse(self, fault: str, remedy: str = "it is corrupt; download it again") -> NoReturn:
        raise CheckpointError(f"{self._path} {fault}: {remedy}.")


GGUF = Format(
    name="GGUF",
    suffixes=(".gguf",),
    magic=b"GGUF",
    index_file=None,
    single_file=None,
    of_any_name=True,
    choose=choose_files,
    read_header=_read_header,
)
