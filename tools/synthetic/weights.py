"""Writes weight files in safetensors format, with tensors that are random, constant or holes."""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from layerstream.tools.synthetic.shapes import Tensor

__all__ = ["DTYPES", "data_bytes", "header", "noise", "sharded", "write_shard"]

# The name of a dtype in a config, its name in a safetensors header, and bytes per element.
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}

# Standard deviation of the weights, the usual initializer_range.
_SCALE = 0.02

# Generating random numbers takes a hundred times as long as writing them, so one block is generated and written
# repeatedly. Its length is prime, so that the rows of a matrix are not equal.
_BLOCK_ELEMENTS = 4_194_301


def data_bytes(tensors: Iterable[Tensor], dtype: str) -> int:
    """Bytes of ``tensors`` in a file, without its header."""
    return sum(tensor.numel for tensor in tensors) * DTYPES[dtype][1]


def sharded(
    tensors: Iterable[Tensor], *, dtype: str, max_shard_bytes: int
) -> Iterator[list[Tensor]]:
    """Split tensors, in order, into shards of at most ``max_shard_bytes``; a larger tensor gets its own shard.

    Each shard is sorted by name, as the format's own writer sorts tensors of one dtype.
    """
    shard: list[Tensor] = []
    shard_bytes = 0
    for tensor in tensors:
        tensor_bytes = data_bytes([tensor], dtype)
        if shard and shard_bytes + tensor_bytes > max_shard_bytes:
            yield sorted(shard, key=lambda tensor: tensor.name)
            shard, shard_bytes = [], 0
        shard.append(tensor)
        shard_bytes += tensor_bytes
    yield sorted(shard, key=lambda tensor: tensor.name)


def header(tensors: Iterable[Tensor], dtype: str) -> bytes:
    """Encode a safetensors header: its length, JSON, and spaces up to a multiple of eight bytes."""
    name, width = DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.numel * width
        entries[tensor.name] = {"dtype": name, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def noise(seed: int, dtype: str) -> memoryview:
    """Generate the block of random weights that tensors are written from."""
    values = np.random.default_rng(seed).standard_normal(_BLOCK_ELEMENTS, dtype=np.float32)
    return _encoded(values * np.float32(_SCALE), dtype)


def write_shard(
    path: Path,
    tensors: Sequence[Tensor],
    *,
    dtype: str,
    block: memoryview | None,
    advance: Callable[[int], object],
) -> None:
    """Write one file; without a ``block`` of noise, the weights are a hole in it."""
    with path.open("wb") as file:
        file.write(header(tensors, dtype))
        if block is None:
            file.truncate(file.tell() + data_bytes(tensors, dtype))
            return
        for tensor in tensors:
            _write_tensor(file, tensor, dtype=dtype, block=block)
            advance(data_bytes([tensor], dtype))
        file.flush()
        os.fsync(file.fileno())  # else the next reader of the file would also wait for this write


def _write_tensor(file: BinaryIO, tensor: Tensor, *, dtype: str, block: memoryview) -> None:
    if tensor.constant is not None:
        file.write(_encoded(np.full(tensor.numel, tensor.constant, np.float32), dtype))
        return
    width = DTYPES[dtype][1]
    # The name decides where in the block a tensor begins, so that its values do not depend on the sharding.
    start = zlib.crc32(tensor.name.encode()) % _BLOCK_ELEMENTS * width
    left = tensor.numel * width
    while left:
        piece = block[start : start + left]
        file.write(piece)
        left -= len(piece)
        start = 0


def _encoded(values: npt.NDArray[np.float32], dtype: str) -> memoryview:
    """Encode ``values`` in ``dtype``, rounded to nearest even; numpy has no bfloat16."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        return memoryview(rounded.astype("<u2").tobytes())
    return memoryview(values.astype("<f2" if dtype == "float16" else "<f4").tobytes())
