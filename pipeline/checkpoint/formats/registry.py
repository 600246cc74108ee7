"""The formats that are known, and which one claims a file."""

from layerstream.pipeline.checkpoint.formats.format import (
    ByteRange,
    Format,
    HeaderReader,
    WeightFile,
)
from layerstream.pipeline.checkpoint.formats.gguf import GGUF
from layerstream.pipeline.checkpoint.formats.safetensors import SAFETENSORS
from layerstream.pipeline.checkpoint.formats.torch_bin import TORCH_BIN
from layerstream.stages.errors import CheckpointError

__all__ = ["FORMATS", "format_by_name", "read_header"]

FORMATS = (SAFETENSORS, TORCH_BIN, GGUF)
"""In the order in which a folder's files are preferred; it is transformers'."""

_MAGIC_BYTES = 8


def format_by_name(name: str) -> Format | None:
    """The format that a file's name indicates."""
    return next((known for known in FORMATS if name.lower().endswith(known.suffixes)), None)


def read_header(file: WeightFile, number: int) -> HeaderReader:
    """Read a file's header with the format that claims it by its name.

    Raises:
        CheckpointError: The file is no file of weights, or begins like one of another format.
    """
    magic = yield ByteRange(offset=0, length=_MAGIC_BYTES)
    if magic == b"version ":
        raise CheckpointError(
            f"{file.path} is a git-lfs pointer, not the weights themselves: fetch them with "
            "'git lfs pull', or download the model again."
        )
    named = format_by_name(file.name) or SAFETENSORS
    found = next((each for each in FORMATS if each.magic and magic.startswith(each.magic)), named)
    if found is not named:
        raise CheckpointError(
            f"{file.path} is a {found.name} file, not a {named.name} file: give it a name that ends "
            f"in {found.suffixes[0]}."
        )
    return (yield from named.read_header(file, number))
