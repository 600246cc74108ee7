"""Parses and validates the header of a safetensors file, which describes each tensor.

The format: 8 bytes of header length, little-endian; a JSON object
of tensors; the data, without gaps or overlaps.
"""

import operator
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from layerstream.pipeline.checkpoint.formats.format import (
    ByteRange,
    Format,
    Header,
    HeaderReader,
    TensorInfo,
    WeightFile,
    quoted,
)
from layerstream.pipeline.checkpoint.formats.safetensors_json import (
    check_values,
    decode_json,
)
from layerstream.stages.errors import CheckpointError

__all__ = ["DTYPES", "SAFETENSORS"]

_PREFIX_BYTES = 8

# safetensors' own limit; it keeps a corrupt length from allocating the machine's memory.
_MAX_HEADER_BYTES = 100_000_000

# torch's sizes are signed 64-bit integers, and sizes in bits must fit as well as those in bytes.
_MAX_NUMBER = 2**60

DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "F32": ("float32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
}
"""The name in the file -> (torch's name, bits per element). F6_E2M3 and F6_E3M2 exist in the format, but not in torch."""

_OFFSET, _NBYTES = (operator.attrgetter(field) for field in ("offset", "nbytes"))

# A header as all known writers make it: in this order, without escapes in names, numbers below 10**18. Others are
# parsed as JSON, which takes longer. Groups: metadata; a tensor's name, dtype and shape, begin, end.
_REGULAR_START = re.compile(
    r'\{(?:("__metadata__": ?\{(?:[^"{}\[\]]|"[^"\\]*(?:\\.[^"\\]*)*")*+\}), ?(?="))?', re.DOTALL
)
_REGULAR_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*)": ?\{("dtype": ?"[A-Z0-9_]*", ?"shape": ?\[[0-9, ]*\]), ?'
    r'"data_offsets": ?\[(0|[1-9][0-9]{0,17}), ?(0|[1-9][0-9]{0,17})\]\}(?:, ?(?=")|\} *\Z)'
)
_REGULAR_SHAPE = re.compile(r"(?:(?:0|[1-9][0-9]{0,17})(?:, ?(?=[0-9])|\Z))*")


class _Place(NamedTuple):
    """Where the data of a header is: the file, its number, and the offset of the first byte behind the header."""

    path: Path
    file: int
    start: int


def _read_header(file: WeightFile, number: int) -> HeaderReader:
    """See ``Format.read_header``."""
    path, size_bytes = file.path, file.size_bytes
    prefix = yield ByteRange(offset=0, length=_PREFIX_BYTES)
    if len(prefix) < _PREFIX_BYTES:
        raise CheckpointError(
            f"{path} has only {size_bytes} bytes, too few for a safetensors file: "
            "download it again."
        )
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is corrupt: its first 8 bytes give a header of "
            f"{length:,} bytes, where {_MAX_HEADER_BYTES:,} are allowed; download it again."
        )
    if length > size_bytes - _PREFIX_BYTES:
        raise CheckpointError(
            f"{path} is truncated within its header, or is not a safetensors file: the header "
            f"takes {length:,} bytes and the whole file has {size_bytes:,}; download it again."
        )
    header = yield ByteRange(offset=_PREFIX_BYTES, length=length)
    return Header(tensors=_parse_header(header, path=path, size_bytes=size_bytes, file=number))


def _parse_header(
    header: bytes, *, path: Path, size_bytes: int, file: int
) -> dict[str, TensorInfo]:
    """Return the tensors of a file in the order of their offsets, after checking each rule of the format."""
    check_values(header, path)
    start = _PREFIX_BYTES + len(header)
    place = _Place(path=path, file=file, start=start)
    tensors = _regular_tensors(header, place)
    if tensors is None:
        entries = decode_json(header, path)
        _check_metadata(entries.pop("__metadata__", {}), path)
        tensors = {name: _parse_entry(name, entry, place) for name, entry in entries.items()}
    tensors = _by_offset(tensors)
    expected = start
    for info in tensors.values():
        if info.offset != expected:
            fault = "overlaps the tensor before it" if info.offset < expected else "follows a gap"
            where = f"it starts at byte {info.offset - start:,}, not {expected - start:,}"
            _refuse(path, info.name, f"{fault}: {where}")
        expected += info.nbytes
    _check_file_size(path, expected_bytes=expected, size_bytes=size_bytes, tensors=tensors)
    return tensors


def _by_offset(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    # numpy sorts without the GIL: list.sort would hold up all other threads for a second or two with a million tensors.
    infos = list(tensors.values())
    begins, sizes = (
        np.fromiter(map(field, infos), np.int64, len(infos)) for field in (_OFFSET, _NBYTES)
    )
    order = np.lexsort((sizes, begins))
    if (order[1:] > order[:-1]).all():
        return tensors
    return {infos[at].name: infos[at] for at in order}


def _regular_tensors(header: bytes, place: _Place) -> dict[str, TensorInfo] | None:
    """Return the tensors of a header that is written as headers usually are.

    None if it is not, or if it may break a rule about the header as a whole: then it must be parsed as JSON.
    """
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError:
        return None
    begun = _REGULAR_START.match(text)
    if begun is None:
        return None
    first_of_kind: dict[str, TensorInfo] = {}
    tensors: dict[str, TensorInfo] = {}
    at, count = begun.end(), 0
    # One short match at a time, so that other threads get the GIL in between.
    while at < len(text) or not count:
        match = _REGULAR_ENTRY.match(text, at)
        if match is None:
            return None
        name, kind, begin, end = match.groups()
        offset, nbytes = place.start + int(begin), int(end) - int(begin)
        known = first_of_kind.get(kind)
        if known is None or nbytes != known.nbytes:  # a new kind, or it breaks a rule
            shape = kind[kind.index("[") + 1 : -1]
            if _REGULAR_SHAPE.fullmatch(shape) is None:
                return None
            sizes = tuple(map(int, shape.split(","))) if shape else ()
            entry = (kind.split('"', 4)[3], sizes, (int(begin), int(end)))
            known = first_of_kind[kind] = _parse_entry(name, entry, place)
        tensors[name] = TensorInfo(name, known.dtype, known.shape, place.file, offset, known.nbytes)
        at, count = match.end(), count + 1
    if len(tensors) != count or "__metadata__" in tensors:
        return None
    if begun[1]:
        metadata = decode_json(f"{{{begun[1]}}}".encode(), place.path)["__metadata__"]
        _check_metadata(metadata, place.path)
    return tensors


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise CheckpointError(
            f"{path} has a __metadata__ that does not map strings to strings: it is corrupt; "
            "download it again, or write it again with safetensors."
        )


def _parse_entry(name: str, entry: Any, place: _Place) -> TensorInfo:
    # This may run for each of 100,000 tensors: hence type() and plain loops.
    path = place.path
    if type(entry) is not tuple or len(entry[2]) != 2 or type(entry[0]) is not str:  # noqa: PLR2004
        _refuse(path, name, "is not described by a dtype, a shape and two data_offsets")
    dtype, shape, (begin, end) = entry
    product = 1  # of all dimensions but those of 0
    for number in (begin, end, *shape):
        if type(number) is not int or not 0 <= number <= _MAX_NUMBER:
            limits = "only whole numbers from 0 to 2**60 are allowed"
            _refuse(
                path, name, f"has {quoted(number)} in its shape or data_offsets, where {limits}"
            )
    for number in shape:
        # Checked at each step: the product of a shape of 400,000 dimensions would take minutes.
        product *= number or 1
        if product > _MAX_NUMBER:
            _refuse(path, name, "has a shape of more than 2**60 elements")
    if dtype not in DTYPES:
        _refuse(path, name, f"has dtype {quoted(dtype)}, which torch does not know", "convert it")
    dtype, bits = DTYPES[dtype]
    elements = 0 if 0 in shape else product
    if elements * bits != 8 * (end - begin):
        needs = f"{elements * bits / 8:,.10g} bytes"
        _refuse(path, name, f"has {end - begin:,} bytes, but its shape and dtype take {needs}")
    if bits < 8:  # noqa: PLR2004 - less than a byte: torch packs two to an element
        shape = _packed_shape(shape, path, name)
    return TensorInfo(name, dtype, shape, place.file, place.start + begin, end - begin)


def _packed_shape(shape: tuple[int, ...], path: Path, name: str) -> tuple[int, ...]:
    if not shape or shape[-1] % 2:
        _refuse(path, name, "is of packed 4-bit floats, so its last dimension must be even")
    return (*shape[:-1], shape[-1] // 2)


def _check_file_size(
    path: Path, *, expected_bytes: int, size_bytes: int, tensors: dict[str, TensorInfo]
) -> None:
    if size_bytes < expected_bytes:
        ends = ((name, info.offset + info.nbytes) for name, info in tensors.items())
        cut = next((name for name, end in ends if end > size_bytes), "")
        raise CheckpointError(
            f"{path} is truncated: its header describes {expected_bytes:,} bytes and the file has "
            f"{size_bytes:,}, so that tensor {quoted(cut)} is cut short; download it again."
        )
    if size_bytes > expected_bytes:
        raise CheckpointError(
            f"{path} has {size_bytes - expected_bytes:,} bytes after its last tensor, which the "
            "header does not describe: it is corrupt; download it again."
        )


def _refuse(path: Path, name: str, fault: str, remedy: str = "download the file again") -> NoReturn:
    raise CheckpointError(f"{path}: tensor {quoted(name)} {fault}; {remedy}.")


SAFETENSORS = Format(
    name="safetensors",
    suffixes=(".safetensors",),
    magic=b"",
    index_file="model.safetensors.index.json",
    single_file="model.safetensors",
    of_any_name=True,
    choose=lambda _path, names: names,
    read_header=_read_header,
)
