"""Reads which tensors are in a file of torch.save, where, and how they are laid out.

The format: a zip archive of stored entries below one folder; ``data.pkl``, a pickle of tensors that refer to their memory by
a key; ``data/<key>``, the memory.
"""

import math
from collections.abc import Generator, Mapping
from typing import Any

from layerstream.pipeline.checkpoint.formats.format import (
    ByteRange,
    Format,
    Header,
    HeaderReader,
    TensorInfo,
    WeightFile,
    quoted,
)
from layerstream.pipeline.checkpoint.formats.pickled_tensors import PickledStorage, PickledTensor
from layerstream.pipeline.checkpoint.formats.tensor_pickle import read_tensor_pickle
from layerstream.pipeline.checkpoint.formats.zip_directory import (
    Entry,
    content_of,
    read_directory,
    refuse,
)

__all__ = ["TORCH_BIN"]

# What files began with before torch 1.6.
_OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_MAX_PICKLE_BYTES = 100_000_000
_NUMBERS = (".format_version", ".storage_alignment")
_RECORDS = (".data/version", "version", "byteorder", ".data/serialization_id", *_NUMBERS)
_MAX_RECORD_BYTES = 100
_VERSIONS = range(1, 11)
_WRITE_AGAIN = "load it with torch.load, and write it again with safetensors"
_ITEM_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "float32": 4, "int32": 4, "uint32": 4,
               "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}  # fmt: skip


def _read_header(file: WeightFile, number: int) -> HeaderReader:
    """See ``Format.read_header``."""
    start = yield ByteRange(offset=0, length=16)
    if start.startswith(_OLD):
        refuse(
            file,
            "is in torch's format from before version 1.6",
            "load it with torch.load, and write it again with torch.save or safetensors",
        )
    entries = yield from read_directory(file)
    folder = next(iter(entries), "").partition("/")[0]
    yield from _check_records(entries, folder, file)
    entry = entries.get(f"{folder}/data.pkl")
    if entry is None or entry.nbytes > _MAX_PICKLE_BYTES:
        refuse(
            file, "has no data.pkl that describes its tensors, so that it is no file of torch.save"
        )
    content = yield from _small(entry, file)
    try:
        state = read_tensor_pickle(content)
    except ValueError as error:
        refuse(file, f"holds a pickle that is {error}", f"if you trust it, {_WRITE_AGAIN}")
    tensors = _named_tensors(state, file)
    starts: dict[str, int] = {}
    for tensor in tensors.values():
        storage = tensor.storage
        if storage.key not in starts:
            entry = entries.get(f"{folder}/data/{storage.key}")
            starts[storage.key] = yield from _start_of(storage, entry, file)
    return Header(
        tensors={
            name: _info(name, tensor, starts[tensor.storage.key], file, number)
            for name, tensor in tensors.items()
        }
    )


def _check_records(
    entries: Mapping[str, Entry], folder: str, file: WeightFile
) -> Generator[ByteRange, bytes, None]:
    """Refuse an archive that torch does not read, or reads as something else than little-endian tensors."""
    stray = next((name for name in entries if not name.startswith(f"{folder}/")), None)
    if stray is not None:
        refuse(file, f"has an entry {quoted(stray)} outside of the folder of the others")
    if f"{folder}/constants.pkl" in entries:
        refuse(file, "is a TorchScript program, not weights", "export its weights")
    records = {}
    for name in _RECORDS:
        entry = entries.get(f"{folder}/{name}")
        if entry is not None and entry.nbytes <= _MAX_RECORD_BYTES:
            records[name] = yield from _small(entry, file)
    order = records.get("byteorder", b"little")
    if order != b"little":
        refuse(file, "is of a big-endian machine", _WRITE_AGAIN)
    version = records.get(".data/version") or records.get("version") or b""
    numbers = [version, *(records[name] for name in _NUMBERS if name in records)]
    if not all(record.isascii() for record in records.values()):
        refuse(file, "has records that are no text")
    if not all(number.strip().isdigit() for number in numbers) or int(version) not in _VERSIONS:
        refuse(file, f"is of a version of torch.save that is not supported ({quoted(version)})")


def _small(entry: Entry | None, file: WeightFile) -> Generator[ByteRange, bytes, bytes]:
    """The content of an entry; empty if there is none."""
    if entry is None:
        return b""
    start = yield from content_of(entry, file)
    content = yield ByteRange(offset=start, length=entry.nbytes)
    return content


def _start_of(
    storage: PickledStorage, entry: Entry | None, file: WeightFile
) -> Generator[ByteRange, bytes, int]:
    nbytes = storage.values * _ITEM_BYTES.get(storage.dtype, 1)
    # torch gives memory of another size as it happens to be.
    if entry is None or nbytes != entry.nbytes:
        found = "is not there" if entry is None else f"has {entry.nbytes:,}"
        refuse(
            file, f"has a tensor in memory {quoted(storage.key)} of {nbytes:,} bytes, which {found}"
        )
    start = yield from content_of(entry, file)
    return start


def _named_tensors(state: Any, file: WeightFile) -> dict[str, PickledTensor]:
    if not isinstance(state, dict):
        refuse(file, f"holds a {type(state).__name__}, not a dict of tensors", _WRITE_AGAIN)
    for name, tensor in state.items():
        if type(name) is not str or type(tensor) is not PickledTensor:
            kind = type(tensor).__name__.removeprefix("Pickled")
            refuse(
                file,
                f"holds {kind} by the name {quoted(name)}, where only named tensors are allowed",
                _WRITE_AGAIN,
            )
    return dict(state)


def _info(
    name: str, tensor: PickledTensor, start: int, file: WeightFile, number: int
) -> TensorInfo:
    item_bytes = _ITEM_BYTES.get(tensor.dtype, 1)
    shape, strides = tensor.shape, tensor.strides
    pairs = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    empty = any(size == 0 for size in shape)
    values = 0 if empty else 1 + sum((size - 1) * stride for size, stride in pairs)
    storage_bytes = tensor.storage.values * _ITEM_BYTES.get(tensor.storage.dtype, 1)
    if not empty and (tensor.offset + values) * item_bytes > storage_bytes:
        refuse(file, f"has a tensor {quoted(name)} that ends behind its memory")
    contiguous = [math.prod(size for size, _ in pairs[at + 1 :]) for at in range(len(pairs))]
    in_order = empty or contiguous == [stride for _, stride in pairs]
    return TensorInfo(
        name=name,
        dtype=tensor.dtype,
        shape=shape if in_order else (values,),
        file=number,
        offset=start + (0 if empty else tensor.offset * item_bytes),
        nbytes=values * item_bytes,
        strided=None if in_order else (shape, strides),
    )


TORCH_BIN = Format(
    name="torch.save",
    suffixes=(".bin", ".pt", ".pth"),
    magic=b"PK\x03\x04",
    index_file="pytorch_model.bin.index.json",
    single_file="pytorch_model.bin",
    of_any_name=False,
    choose=lambda _path, names: names,
    read_header=_read_header,
)
