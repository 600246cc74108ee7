"""Parses and validates the header of a safetensors file, which describes each tensor.

The format: 8 bytes of header length, little-endian; a JSON object
of tensors; the data, without gaps or overlaps.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

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
from layerstream.stages.errors import CheckpointError

__all__ = ["DTYPES", "SAFETENSORS"]

_PREFIX_BYTES = 8

# safetensors' own limit; it keeps a corrupt length from allocating the machine's memory.
_MAX_HEADER_BYTES = 100_000_000

# safetensors refuses JSON that nests deeper; Python's parser goes on for as long as its stack lasts.
_MAX_DEPTH = 127

# Numbers, arrays and objects of a header beyond 16 for each tensor. Python's parser keeps the GIL and takes a few
# gigabytes for a hundred megabytes of empty arrays; the JSON that some put into __metadata__ has far fewer.
_MAX_SURPLUS_VALUES = 1_000_000

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

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

_Entry = tuple[int, int, str, str, tuple[int, ...]]  # begin, end (in the data), name, dtype, shape


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
    entries = _decode_json(header, path)
    _check_metadata(entries.pop("__metadata__", {}), path)
    rows = [_parse_entry(name, entry, path) for name, entry in entries.items()]
    if rows:
        # numpy sorts without the GIL: list.sort would hold up all other threads for a second or two with a million rows.
        begins, ends = np.array([row[:2] for row in rows], dtype=np.int64).T
        rows = [rows[at] for at in np.lexsort((ends, begins))]
    data_start = _PREFIX_BYTES + len(header)
    tensors = {}
    expected = 0
    for begin, end, name, dtype, shape in rows:
        if begin != expected:
            fault = "overlaps the tensor before it" if begin < expected else "follows a gap"
            _refuse(path, name, f"{fault}: it starts at byte {begin:,}, not {expected:,}")
        expected = end
        tensors[name] = TensorInfo(
            name=name,
            dtype=dtype,
            shape=shape,
            file=file,
            offset=data_start + begin,
            nbytes=end - begin,
        )
    _check_file_size(path, expected_bytes=data_start + expected, size_bytes=size_bytes, rows=rows)
    return tensors


def _decode_json(header: bytes, path: Path) -> dict[str, Any]:
    values = sum(map(header.count, (b"{", b"[", b",")))
    if values > 16 * header.count(b'"data_offsets"') + _MAX_SURPLUS_VALUES:
        raise CheckpointError(
            f"{path} has a header of {values:,} values, far more than its tensors need: it is "
            "corrupt, or not a safetensors file; download it again."
        )
    try:
        entries = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_json_object,
            parse_int=_json_integer if b"-0" in header else int,
            parse_constant=_refuse_constant,
        )
        if b"\\u" in header:  # an unpaired surrogate parses, but cannot be encoded as a name
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a header that is not valid JSON ({error}): it is corrupt, or not a "
            "safetensors file; download it again."
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{path} has a header that is a JSON {type(entries).__name__}, not an object of "
            "tensors: it is not a safetensors file; download it again."
        )
    # A regular header has three brackets for each tensor, and is not searched for deep ones.
    brackets = header.count(b"{") + header.count(b"[")
    if brackets > 3 * len(entries) + 100 and _depth(header) > _MAX_DEPTH:
        raise CheckpointError(
            f"{path} has a header that nests deeper than {_MAX_DEPTH} levels, which safetensors "
            "refuses: it is corrupt; download it again."
        )
    return entries


def _depth(header: bytes) -> int:
    """How deep the objects and arrays of valid JSON nest."""
    structure = re.sub(rb'"[^"\\]*(?:\\.[^"\\]*)*"', b"", header, flags=re.DOTALL)
    brackets = structure.translate(bytes.maketrans(b"[{]}", b"\1\1\xff\xff"), _NO_BRACKETS)
    return int(np.frombuffer(brackets, dtype=np.int8).cumsum(dtype=np.int32).max(initial=0))


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | tuple[Any, ...]:
    """Build a JSON object without duplicate keys, of which json itself silently keeps the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        duplicate = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {quoted(duplicate)} occurs twice in one object")
    shape, offsets = result.get("shape"), result.get("data_offsets")
    if type(shape) is list and type(offsets) is list and "dtype" in result:
        # The garbage collector stops tracking tuples of numbers; with 100,000 dicts of lists it would take
        # more time than all the parsing.
        return result["dtype"], tuple(shape), tuple(offsets)
    return result


def _json_integer(text: str) -> int:
    # "-0" is a float to safetensors, which refuses it. As a negative number it is refused here too.
    return -1 if text == "-0" else int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise CheckpointError(
            f"{path} has a __metadata__ that does not map strings to strings: it is corrupt; "
            "download it again, or write it again with safetensors."
        )


def _parse_entry(name: str, entry: Any, path: Path) -> _Entry:
    # This runs once per tensor, and a checkpoint may have 100,000: hence type() and plain loops.
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
    return begin, end, name, dtype, shape


def _packed_shape(shape: tuple[int, ...], path: Path, name: str) -> tuple[int, ...]:
    if not shape or shape[-1] % 2:
        _refuse(path, name, "is of packed 4-bit floats, so its last dimension must be even")
    return (*shape[:-1], shape[-1] // 2)


def _check_file_size(
    path: Path, *, expected_bytes: int, size_bytes: int, rows: list[_Entry]
) -> None:
    if size_bytes < expected_bytes:
        data_start = expected_bytes - (rows[-1][1] if rows else 0)
        cut = next((row[2] for row in rows if data_start + row[1] > size_bytes), "")
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
