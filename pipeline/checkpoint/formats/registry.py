"""The formats that are known, and which one claims a file."""

from layerstream.pipeline.checkpoint.formats.format import (
    ByteRange,
    Format,
    HeaderReader,
    WeightFile,
)
from layerstream.pipeline.checkpoint.formats.gguf import GGUF
from layerstream.pipeline.checkpoint.formats.safetensors import SAFETENSORS
from layerstream.stages.errors import CheckpointError

__all__ = ["FORMATS", "format_by_name", "read_header"]

FORMATS = (SAFETENSORS, GGUF)
"""In the order in which a folder's files are preferred."""

_MAGIC_BYTES = 8
_MAGICS: dict[bytes, Format | str] = {
    **{known.magic: known for known in FORMATS if known.magic},
    b"PK\x03\x04": "pickled torch",
}


def format_by_name(name: str) -> Format | None:
    """The format that a file's name indicates."""
    return next((known for known in FORMATS if name.lower().endswith(known.suffix)), None)


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
    found = next((kind for start, kind in _MAGICS.items() if magic.startswith(start)), named)
    if found is not named:
        remedy = (
            f"give it a name that ends in {found.suffix}"
            if isinstance(found, Format)
            else "convert it: load it with transformers, and write it with save_pretrained()"
        )
        kind = found.name if isinstance(found, Format) else found
        raise CheckpointError(f"{file.path} is a {kind} file, not a {named.name} file: {remedy}.")
    return (yield from named.read_header(file, number))
