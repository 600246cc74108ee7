"""Writes one file of a converted checkpoint, some rows at a time, and checks one that was written."""

import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from layerstream.pipeline.checkpoint.formats.safetensors_writing import write_at
from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.stages.errors import CheckpointError
from layerstream.tools.convert.encoding import Encoding
from layerstream.tools.convert.layout import ConvertedShard, ConvertedTensor

__all__ = ["LayerError", "is_intact", "write_shard"]

# What is computed from so many bytes stays in a processor's cache; larger blocks are slower, and take up to 30 times as
# much memory.
_BLOCK_BYTES = 1 << 20


class LayerError(NamedTuple):
    """What conversion changed in a layer."""

    squared_error: float
    squared_weight: float

    @property
    def relative(self) -> float:
        """The root of the mean squared error, relative to that of the weights."""
        return (
            float((self.squared_error / self.squared_weight) ** 0.5) if self.squared_weight else 0.0
        )


def write_shard(
    path: Path,
    shard: ConvertedShard,
    *,
    reader: SourceReader,
    encoding: Encoding,
    layers: Mapping[str, str],
    advance: Callable[[int], object],
) -> tuple[int, dict[str, LayerError]]:
    """Convert the tensors of ``shard`` and write them to ``path``.

    Args:
        path: Written anew if it is there.
        shard: What is written.
        reader: Of the source.
        encoding: The form of converted weights.
        layers: The layer of each tensor of the source.
        advance: Called with the number of bytes converted since the last call.

    Returns:
        A checksum of the file, and the errors by layer.

    Raises:
        CheckpointError: A weight is not finite.
        ReadError: A tensor cannot be read.
        OSError: The file cannot be written.
    """
    sums: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    checksums = dict.fromkeys(shard.places, 0)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        written: defaultdict[str, int] = defaultdict(int)

        def write(name: str, values: torch.Tensor) -> None:
            data = _bytes_of(values).numpy().data
            checksums[name] = zlib.crc32(data, checksums[name])
            write_at(descriptor, data, shard.places[name].offset + written[name])
            written[name] += len(data)

        write_at(descriptor, memoryview(shard.header), 0)
        for tensor in shard.tensors:
            if tensor.converted:
                for found in _convert(tensor, reader, encoding, write, advance):
                    before = sums[layers[tensor.source.name]]
                    sums[layers[tensor.source.name]] = (before[0] + found[0], before[1] + found[1])
            else:
                for piece in _copied(tensor, reader):
                    write(tensor.source.name, piece)
                    advance(piece.nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _combined(checksums), {layer: LayerError(*found) for layer, found in sums.items()}


def is_intact(path: Path, shard: ConvertedShard, checksum: int) -> bool:
    """Whether ``path`` holds ``shard`` with this checksum; it is read from beginning to end."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != shard.nbytes:
            return False
        if file.read(len(shard.header)) != shard.header:
            return False
        checksums = {}
        for name, place in shard.places.items():
            found, rest = 0, place.nbytes
            while rest and (data := file.read(min(rest, _BLOCK_BYTES))):
                found, rest = zlib.crc32(data, found), rest - len(data)
            checksums[name] = found
    return _combined(checksums) == checksum


def _convert(
    tensor: ConvertedTensor,
    reader: SourceReader,
    encoding: Encoding,
    write: Callable[[str, torch.Tensor], None],
    advance: Callable[[int], object],
) -> Iterator[tuple[float, float]]:
    """Convert a weight; yields the squared errors and squared weights of some rows after the other."""
    info = tensor.source
    rows, columns = info.shape
    row_bytes = info.nbytes // rows if rows else 0
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    stem = info.name.removesuffix("weight")
    if encoding.packs:
        write(f"{stem}weight_shape", torch.tensor(info.shape))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        data = reader.read(info, first * row_bytes, count * row_bytes)
        encoded = encoding.encode(data.view(getattr(torch, info.dtype)).view(count, columns))
        if encoded is None:
            raise CheckpointError(
                f"{reader.checkpoint.files[info.file].path}: tensor {info.name!r} holds NaN or infinite values, which "
                f"{encoding.target} cannot hold; download the file again, or use the checkpoint as it is."
            )
        for name, values in encoded.parts.items():
            write(stem + name, values)
        yield encoded.squared_error, encoded.squared_weight
        advance(data.nbytes)


def _copied(tensor: ConvertedTensor, reader: SourceReader) -> Iterator[torch.Tensor]:
    """The bytes of a tensor that stays as it is, some at a time."""
    info = tensor.source
    if info.strided is not None:
        values = reader.read(info, 0, info.nbytes).view(getattr(torch, info.dtype))
        yield _bytes_of(values.as_strided(*info.strided))
        return
    for first in range(0, info.nbytes, _BLOCK_BYTES):
        yield reader.read(info, first, min(_BLOCK_BYTES, info.nbytes - first))


def _bytes_of(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(-1).view(torch.uint8)


def _combined(checksums: Mapping[str, int]) -> int:
    return zlib.crc32(repr(sorted(checksums.items())).encode())
