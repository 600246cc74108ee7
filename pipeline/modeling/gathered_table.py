"""Embedding tables whose rows are read from the files when they are looked up.

A token needs one row of a table that may have a quarter of a million. Streaming the whole table for it would cost more
than a decoder block; reading the row costs a few KiB, and common rows are in the page cache.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Self

import torch

from layerstream.pipeline.modeling.edits import Streams
from layerstream.pipeline.modeling.table_source import FileSpan, TableSource
from layerstream.pipeline.modeling.wrapper_tensor import WrapperTensor
from layerstream.stages.batch import Extent
from layerstream.stages.errors import ModelError
from layerstream.stages.unpack.packing import Packing

__all__ = ["SMALL_WEIGHT_BYTES", "GatheredTable", "empty_congruent"]

# Buffer for rows between the file and the result: enough for common prompts in one piece, and small compared with
# any slot.
_SCRATCH_BYTES = 4 << 20

# Weights up to this size may be used in any way (slices of learned positions): they are quickly read whole.
SMALL_WEIGHT_BYTES = 16 << 20

# The widest vectors of today's processors: kernels treat what precedes such a boundary separately.
_VECTOR_BYTES = 64

_aten = torch.ops.aten


class GatheredTable(Streams, WrapperTensor, torch.nn.Parameter):
    """An embedding's weight that stays in its files.

    To torch it is a parameter of the table's shape (rows, width), dtype and device. Looking rows up gives the same
    bits as a table in memory, on the device of the indices. Any other computation reads the whole table if it is
    small, and raises a ``ModelError`` otherwise.
    """

    _source: TableSource
    _extents: tuple[Extent, ...]
    _first_rows: list[int]
    """Of each extent, and behind them the number of all rows."""
    _packing: Packing | None
    _row_bytes: int
    """In the files."""
    _is_copied: bool
    protects_parts = True

    @staticmethod
    def __new__(
        cls: type[Self],
        source: TableSource,
        *,
        extents: Sequence[Extent],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        packing: Packing | None = None,
        is_copied: bool = False,
    ) -> Self:
        """Make a table of the rows in ``extents`` of the source's files, one behind the other.

        Each extent holds whole rows, which are ``packing`` rows if there is one; ``shape`` and ``dtype`` are those of the
        unpacked table. ``is_copied``: transformers copies the rows from the mapped file, since loading does more than that.
        """
        if len(shape) != 2:  # noqa: PLR2004 - rows and width
            raise ModelError(
                f"An embedding table has rows and a width, not the shape {tuple(shape)}."
            )
        table: Self = cls.without_memory(shape, dtype=dtype, device=device)
        table._source, table._extents = source, tuple(extents)
        table._packing, table._is_copied = packing, is_copied
        table._row_bytes = sum(extent.nbytes for extent in extents) // max(1, shape[0])
        counts = (extent.nbytes // max(1, table._row_bytes) for extent in extents)
        table._first_rows = list(accumulate(counts, initial=0))
        return table

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"GatheredTable({self._source.path(self._extents[0].file)}, offset={self._extents[0].offset}, "
            f"extents={len(self._extents)}, shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Gather rows; other operations get the whole table, if it is small."""
        if func is _aten.embedding.default and isinstance(args[0], cls):
            return args[0]._gather(args[1])  # noqa: SLF001 - of this class
        return super().__torch_dispatch__(func, _types, args, kwargs)

    def plain(self, func: Any, *, is_written: bool) -> torch.Tensor:
        """Read the whole table, if it is small."""
        if self.nbytes > SMALL_WEIGHT_BYTES or is_written:
            raise _refusal(str(func))
        # Mostly transformers computes with the bytes in the mapped file, and some kernels give other bits at other
        # addresses modulo the widest vectors.
        offset = 0 if self._is_copied else self._extents[0].offset
        table = empty_congruent(self.shape, self.dtype, offset)
        return self._read(list(range(self.shape[0])), table).to(self.device)

    # The next two would give access to the table's memory, which does not exist.

    def __dlpack__(self, **_: Any) -> Any:
        raise _refusal("dlpack")

    def share_memory_(self) -> Any:
        """Refuse; a table has no memory to share."""
        raise _refusal("share_memory_")

    def _gather(self, indices: torch.Tensor) -> torch.Tensor:
        """The rows at ``indices``, of shape (*indices.shape, width)."""
        rows, width = self.shape
        if indices.dtype not in {torch.int32, torch.int64}:
            return torch.embedding(
                torch.empty((0, width)), indices.cpu()
            )  # raises torch's own error
        unique, positions = torch.unique(indices.cpu(), return_inverse=True)
        if unique.numel() and not 0 <= int(unique[0]) <= int(unique[-1]) < rows:
            raise IndexError(f"index out of range in self: the table has {rows} rows")
        device = indices.device
        result = torch.empty((*indices.shape, width), dtype=self.dtype, device=device)
        step = max(1, _SCRATCH_BYTES // max(1, width * self.element_size()))
        for first in range(0, unique.numel(), step):
            chunk = self._read(unique[first : first + step].tolist())
            in_chunk = (positions >= first) & (positions < first + step)
            result[in_chunk.to(device)] = chunk.to(device)[(positions[in_chunk] - first).to(device)]
        return result

    def _read(self, rows: list[int], result: torch.Tensor | None = None) -> torch.Tensor:
        """Read the given rows, in ascending order, on the CPU; into ``result``, if that is given."""
        if result is None:
            result = torch.empty((len(rows), self.shape[1]), dtype=self.dtype)
        stride = self._row_bytes
        stored = result.view(torch.uint8)
        if self._packing is not None:
            stored = torch.empty((len(rows), stride), dtype=torch.uint8)
        raw_bytes: Any = stored.numpy()
        buffer = memoryview(raw_bytes).cast("B")
        self._source.read_into(
            [
                FileSpan(file, offset, buffer[begin * stride : end * stride])
                for file, offset, begin, end in self._places(rows)
            ]
        )
        if self._packing is not None:
            self._packing.unpack([stored], 0, result)
        return result

    def _places(self, rows: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """File and offset of rows, in ascending order, that follow one another there, and which of ``rows`` they are."""
        begin = 0
        while begin < len(rows):
            part = bisect_right(self._first_rows, rows[begin]) - 1
            end = begin + 1
            while (
                end < len(rows)
                and rows[end] == rows[end - 1] + 1
                and rows[end] < self._first_rows[part + 1]
            ):
                end += 1
            extent, skipped = self._extents[part], rows[begin] - self._first_rows[part]
            yield extent.file, extent.offset + skipped * self._row_bytes, begin, end
            begin = end


def empty_congruent(shape: Sequence[int], dtype: torch.dtype, offset: int) -> torch.Tensor:
    """An empty tensor whose address equals that of a byte at ``offset`` of a mapped file, modulo 64."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(nbytes + _VECTOR_BYTES, dtype=torch.uint8)
    skip = (offset - memory.data_ptr()) % _VECTOR_BYTES
    if skip % dtype.itemsize:  # misaligned tensors of a file are copied before they are used
        return torch.empty(shape, dtype=dtype)
    return memory[skip : skip + nbytes].view(dtype).view(shape)


def _refusal(operation: str) -> ModelError:
    return ModelError(
        f"The model uses its embedding table in a way ({operation}) that takes the whole table, which "
        "is left in its file; let the table stream with its layer instead."
    )
