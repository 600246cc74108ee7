"""Writes weight files in safetensors format, with tensors that are random, constant or holes."""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
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
    return sum(tensor.numel * _width(tensor, dtype) for tensor in tensors)


def sharded(
    tensors: Iterable[Tensor], *, dtype: str, max_shard_bytes: int
) -> Iterator[list[Tensor]]:
    """Split tensors, in order, into shards of at most ``max_shard_bytes``; a larger tensor gets its own shard.

    Each shard is sorted as the format's own writer sorts: wide elements first, then by name.
    """

    def place(tensor: Tensor) -> tuple[int, str]:
        return -_width(tensor, dtype), tensor.name

    shard: list[Tensor] = []
    shard_bytes = 0
    for tensor in tensors:
        tensor_bytes = data_bytes([tensor], dtype)
        if shard and shard_bytes + tensor_bytes > max_shard_bytes:
            yield sorted(shard, key=place)
            shard, shard_bytes = [], 0
        shard.append(tensor)
        shard_bytes += tensor_bytes
    yield sorted(shard, key=place)


def header(tensors: Iterable[Tensor], dtype: str) -> bytes:
    """Encode a safetensors header: its length, JSON, and spaces up to a multiple of eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        name, width = DTYPES[tensor.dtype or dtype]
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
    skew: float,
    advance: Callable[[int], object],
) -> None:
    """Write one file; without a ``block`` of noise, the weights are a hole in it. ``skew`` is for routers."""
    with path.open("wb") as file:
        file.write(header(tensors, dtype))
        if block is None:
            file.truncate(file.tell() + data_bytes(tensors, dtype))
            return
        for tensor in tensors:
            _write_tensor(file, tensor, dtype=dtype, block=block, skew=skew)
            advance(data_bytes([tensor], dtype))
        file.flush()
        os.fsync(file.fileno())  # else the next reader of the file would also wait for this write


def _write_tensor(
    file: BinaryIO, tensor: Tensor, *, dtype: str, block: memoryview, skew: float
) -> None:
    if tensor.constant is not None:
        values = np.full(tensor.numel, tensor.constant, np.float32)
        file.write(_encoded(values, tensor.dtype or dtype))
        return
    pieces = _random_pieces(block, tensor.name, nbytes=tensor.numel * DTYPES[dtype][1])
    if tensor.is_router and skew:
        rows = _decoded(b"".join(pieces), dtype).reshape(tensor.shape)
        norms = _row_norms(tensor.name, tensor.shape[0], skew)
        file.write(_encoded((rows * norms[:, None]).reshape(-1), dtype))
        return
    file.writelines(pieces)


def _random_pieces(block: memoryview, name: str, *, nbytes: int) -> Iterator[memoryview]:
    """Yield ``nbytes`` of the block, from its start again after its end."""
    # The name decides where in the block a tensor begins, so that its values do not depend on the sharding.
    start = zlib.crc32(name.encode()) % _BLOCK_ELEMENTS * (len(block) // _BLOCK_ELEMENTS)
    while nbytes:
        piece = block[start : start + nbytes]
        yield piece
        nbytes -= len(piece)
        start = 0


def _row_norms(name: str, rows: int, skew: float) -> npt.NDArray[np.float32]:
    """Norms of a router's rows relative to their root mean square.

    Experts of large rows get the most tokens. The logarithms of the norms are normally distributed with a standard
    deviation of ``skew``; the name decides which rows are large.
    """
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((rank + 0.5) / rows) for rank in range(rows)])
    norms: npt.NDArray[np.float64] = np.exp(skew * (quantiles - quantiles.max()))  # never infinite
    norms /= np.sqrt(np.mean(norms**2))
    np.random.default_rng(zlib.crc32(name.encode())).shuffle(norms)
    return norms.astype(np.float32)


def _width(tensor: Tensor, dtype: str) -> int:
    """Bytes per element."""
    return DTYPES[tensor.dtype or dtype][1]


def _encoded(values: npt.NDArray[np.float32], dtype: str) -> memoryview:
    """Encode ``values`` in ``dtype``, rounded to nearest even; numpy has no bfloat16."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        return memoryview(rounded.astype("<u2").tobytes())
    return memoryview(values.astype("<f2" if dtype == "float16" else "<f4").tobytes())


def _decoded(data: bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Decode what ``_encoded`` encoded."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f2" if dtype == "float16" else "<f4").astype(np.float32)
