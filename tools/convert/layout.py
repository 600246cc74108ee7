"""Which tensors a converted checkpoint has, in which files and where: known before anything is converted. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo, WeightFile
from layerstream.pipeline.checkpoint.formats.safetensors_writing import (
    WRITABLE_DTYPES,
    SafetensorsLayout,
    StoredTensor,
)
from layerstream.stages.errors import CheckpointError
from layerstream.tools.convert.encoding import Encoding

__all__ = ["ConvertedShard", "ConvertedTensor", "files_of", "lay_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedTensor:
    """A tensor of the source, and what it becomes."""

    source: TensorInfo
    converted: bool
    """Whether it is rounded; else its values stay as they are."""
    parts: tuple[StoredTensor, ...]
    """What it is stored as; ``StoredTensor.name`` is the whole name of a tensor in the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedShard:
    """One file of the result."""

    file_name: str
    header: bytes
    tensors: tuple[ConvertedTensor, ...]
    """In the order in which they are converted: that of the source's files."""
    places: Mapping[str, TensorInfo]
    """The result's tensors, by name, in the order of their offsets; ``file`` is the shard's number."""
    nbytes: int
    """Of the file, header included."""

    @property
    def source_bytes(self) -> int:
        """What has to be read."""
        return sum(tensor.source.nbytes for tensor in self.tensors)


def lay_out(
    checkpoint: Checkpoint, converted: frozenset[str], encoding: Encoding, *, max_shard_bytes: int
) -> tuple[ConvertedShard, ...]:
    """Distribute the result's tensors over files of at most ``max_shard_bytes``; a larger one gets a file of its own.

    Raises:
        CheckpointError: A tensor cannot be stored in safetensors.
    """
    infos = sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.offset))
    tensors = [_tensor(checkpoint, info, info.name in converted, encoding) for info in infos]
    groups = list(_groups(tensors, max_shard_bytes))
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    )
    return tuple(
        _shard(name, number, group)
        for number, (name, group) in enumerate(zip(names, groups, strict=True))
    )


def files_of(shards: Sequence[ConvertedShard], folder: Path) -> tuple[WeightFile, ...]:
    """The files of the result in ``folder``."""
    return tuple(
        WeightFile(name=each.file_name, path=folder / each.file_name, size_bytes=each.nbytes)
        for each in shards
    )


def _tensor(
    checkpoint: Checkpoint, info: TensorInfo, converted: bool, encoding: Encoding
) -> ConvertedTensor:
    if converted:
        stem = info.name.removesuffix("weight")
        parts = tuple(
            part._replace(name=stem + part.name) for part in encoding.parts(info.dtype, *info.shape)
        )
    elif info.dtype in WRITABLE_DTYPES:
        parts = (StoredTensor(info.name, info.dtype, info.logical_shape),)
    else:
        raise CheckpointError(
            f"{checkpoint.files[info.file].path}: tensor {info.name!r} is of dtype {info.dtype}, which safetensors "
            "cannot hold; remove it, or cast it."
        )
    return ConvertedTensor(source=info, converted=converted, parts=parts)


def _groups(
    tensors: Iterable[ConvertedTensor], max_shard_bytes: int
) -> Iterator[tuple[ConvertedTensor, ...]]:
    group: list[ConvertedTensor] = []
    group_bytes = 0
    for tensor in tensors:
        nbytes = sum(part.nbytes for part in tensor.parts)
        if group and group_bytes + nbytes > max_shard_bytes:
            yield tuple(group)
            group, group_bytes = [], 0
        group.append(tensor)
        group_bytes += nbytes
    yield tuple(group)


def _shard(name: str, number: int, tensors: tuple[ConvertedTensor, ...]) -> ConvertedShard:
    stored = (part for tensor in tensors for part in tensor.parts)
    header, places, nbytes = SafetensorsLayout.of(stored, {"format": "pt"}, number=number)
    return ConvertedShard(
        file_name=name, header=header, tensors=tensors, places=places, nbytes=nbytes
    )
