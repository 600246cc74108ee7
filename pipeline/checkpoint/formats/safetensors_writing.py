"""Lays out a safetensors file before anything of it is written."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from layerstream.pipeline.checkpoint.formats.format import TensorInfo
from layerstream.pipeline.checkpoint.formats.safetensors import DTYPES

__all__ = ["WRITABLE_DTYPES", "SafetensorsLayout", "StoredTensor", "write_at"]

_PREFIX_BYTES = 8
_CODES = {dtype: (code, bits) for code, (dtype, bits) in DTYPES.items()}

WRITABLE_DTYPES = frozenset(_CODES)
"""torch's names of the dtypes that the format has."""


class StoredTensor(NamedTuple):
    """What the header says of a tensor."""

    name: str
    dtype: str
    """torch's name."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * max(_CODES[self.dtype][1] // 8, 1)


class SafetensorsLayout(NamedTuple):
    """A file that is to be written."""

    header: bytes
    places: Mapping[str, TensorInfo]
    """The tensors, by name, in the order of their offsets."""
    nbytes: int
    """Of the file, header included."""

    @classmethod
    def of(
        cls, tensors: Iterable[StoredTensor], metadata: Mapping[str, str], *, number: int = 0
    ) -> "SafetensorsLayout":
        """Sorted as by the format's own writer: wide elements first, so that all are aligned, then by name.

        ``number``: That of the file in the checkpoint that it belongs to.
        """
        parts = sorted(tensors, key=lambda part: (-_CODES[part.dtype][1], part.name))
        entries: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for part in parts:
            begin, end = end, end + part.nbytes
            code, bits = _CODES[part.dtype]
            shape = part.shape if bits >= 8 else (*part.shape[:-1], 2 * part.shape[-1])  # noqa: PLR2004 - two to a byte
            entries[part.name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _PREFIX_BYTES)
        header = len(text).to_bytes(_PREFIX_BYTES, "little") + text
        places, offset = {}, len(header)
        for part in parts:
            places[part.name] = TensorInfo(
                name=part.name,
                dtype=part.dtype,
                shape=part.shape,
                file=number,
                offset=offset,
                nbytes=part.nbytes,
            )
            offset += part.nbytes
        return cls(header, places, offset)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
