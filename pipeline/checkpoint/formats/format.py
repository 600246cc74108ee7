"""What a format of weight files is, and what it tells of each tensor."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from layerstream.stages.readers.files import FileVersion

__all__ = [
    "BLOCKS",
    "Block",
    "ByteRange",
    "Format",
    "Header",
    "HeaderReader",
    "TensorInfo",
    "WeightFile",
    "quoted",
]


class Block(NamedTuple):
    """The smallest unit of an encoding: so many values in so many bytes."""

    values: int
    nbytes: int


BLOCKS = {
    "Q4_0": Block(32, 18),
    "Q4_1": Block(32, 20),
    "Q5_0": Block(32, 22),
    "Q5_1": Block(32, 24),
    "Q8_0": Block(32, 34),
    "Q2_K": Block(256, 84),
    "Q3_K": Block(256, 110),
    "Q4_K": Block(256, 144),
    "Q5_K": Block(256, 176),
    "Q6_K": Block(256, 210),
    "IQ1_S": Block(256, 50),
    "IQ1_M": Block(256, 56),
    "IQ2_XXS": Block(256, 66),
    "IQ2_XS": Block(256, 74),
    "IQ2_S": Block(256, 82),
    "IQ3_XXS": Block(256, 98),
    "IQ3_S": Block(256, 110),
    "IQ4_NL": Block(32, 18),
    "IQ4_XS": Block(256, 136),
    "TQ1_0": Block(256, 54),
    "TQ2_0": Block(256, 66),
    "MXFP4": Block(32, 17),
}
"""The encodings that pack the values of a row in blocks, by ggml's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A file of weights."""

    name: str
    """Relative to the checkpoint's folder, as the index spells it."""
    path: Path
    """Absolute; it may be a link (the hub's cache is made of them)."""
    size_bytes: int
    """Of the whole file, including the header."""
    version: FileVersion | None = None
    """Before its header was read; None for a file that exists nowhere."""


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint, and the place of its bytes.

    A tuple, since a header may describe a million: they are made in a third of the time that frozen dataclasses take.
    """

    name: str
    """The checkpoint's name of the tensor."""
    dtype: str
    """torch's name of the dtype, without ``torch.``: "bfloat16", "float8_e4m3fn"; "uint8" if it is encoded."""
    shape: tuple[int, ...]
    """As torch sees it: two packed 4-bit floats count as one element, and the last size of an encoded tensor is the
    bytes of a row.
    """
    file: int
    """An index into Checkpoint.files."""
    offset: int
    """Bytes from the start of the file to the tensor's first byte."""
    nbytes: int
    """Length in bytes; 0 for an empty tensor."""
    encoding: str | None = None
    """A key of ``BLOCKS``, if the values are packed in blocks: "Q4_K"; None if they are stored as ``dtype``."""

    strided: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """(shape, strides in values) of a tensor whose values do not lie in order; ``shape`` is then one dimension of all
    values from its first to its last.
    """

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """The shape of the values: that of the unpacked tensor."""
        if self.strided is not None:
            return self.strided[0]
        if self.encoding is None:
            return self.shape
        block = BLOCKS[self.encoding]
        return (*self.shape[:-1], self.shape[-1] // block.nbytes * block.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Bytes of a file that a format asks for; less come back if the file ends before."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the header of one file says."""

    tensors: dict[str, TensorInfo]
    """In the order of their offsets, or of the file's own list of them."""
    config: Mapping[str, Any] | None = None
    """In the words of a config.json, if the format describes the model as well."""
    part: tuple[int, int] | None = None
    """(number, count) of a file that says itself which part of the model it is; the first is number 0."""


HeaderReader = Generator[ByteRange, bytes, Header]
"""Asks for the bytes that it needs, one range at a time, and returns what they say. So a format does no I/O."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of weight files: one module of this folder."""

    name: str
    """For messages: "safetensors"."""
    suffixes: tuple[str, ...]
    """What the names of its files end in, in lower case; the first is that of new files."""
    magic: bytes
    """What its files begin with; empty if they may begin with anything."""
    index_file: str | None
    """The name of the index of a model in several files; an index of another name ends in the same suffixes."""
    single_file: str | None
    """The name of the file that is the whole model, whatever other files of the format there are."""
    of_any_name: bool
    """Whether files of any name are weights; else only the single file and those of an index are."""
    choose: Callable[[Path, Sequence[str]], Sequence[str]]
    """(path that was opened, names of the files of the format there, in natural order) -> the names of those that are
    the model, if neither index nor single file says so. ``path`` is a folder, or the file that is the one name. Raises
    a CheckpointError if it is unclear.
    """
    read_header: Callable[[WeightFile, int], HeaderReader]
    """(file, its number for ``TensorInfo.file``) -> what it says of its tensors. Raises a CheckpointError if it breaks
    a rule of the format, or disagrees with the size of the file.
    """


def quoted(value: object) -> str:
    """Return a value from a file as ASCII text that fits into an error message."""
    text = ascii(value)
    return text if len(text) < 200 else f"{text[:197]}..."  # noqa: PLR2004 - about two lines
