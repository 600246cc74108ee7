"""Embedding tables whose rows are read from the file when they are looked up.

A token needs one row of a table that may have a quarter of a million. Streaming the whole table for it would cost more
than a decoder block; reading the row costs a few KiB, and common rows are in the page cache.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.edits import Streams
from layerstream.stages.errors import ModelError
from layerstream.stages.readers.files import WeightFiles
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.interruptible import InterruptibleReads
from layerstream.stages.unpack.packing import Packing

__all__ = ["SMALL_WEIGHT_BYTES", "GatheredTable", "TableSource", "empty_congruent"]

# Buffer for rows between the file and the result: enough for common prompts in one piece, and small compared with
# any slot.
_SCRATCH_BYTES = 4 << 20

# Weights up to this size may be used in any way (slices of learned positions): they are quickly read whole.
SMALL_WEIGHT_BYTES = 16 << 20

# The widest vectors of today's processors: kernels treat what precedes such a boundary separately.
_VECTOR_BYTES = 64

_aten = torch.ops.aten


class TableSource:
    """A weight file that rows are read from, by any number of threads; owns its descriptor.

    Reads go through the page cache, unlike those of the layers: rows are far smaller than the blocks of O_DIRECT, and
    the same ones are read again and again.

    Args:
        path: The file.
        guard: Watches over the reads; by default one of its own.
        reads: Makes the reads; by default the threads that look rows up do so.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        guard: ReadGuard | None = None,
        reads: InterruptibleReads | None = None,
    ) -> None:
        self._path = Path(path)
        self._files = WeightFiles([self._path])
        self._guard = guard or ReadGuard()
        self._owns_guard = guard is None
        self._reads = reads

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def read_into(self, spans: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each buffer with the bytes at its offset in the file.

        Raises:
            ReadError: The file is too short, or cannot be read.
            ClosedError: The source has been closed.
        """
        if self._reads is None:
            self._read(spans)
        else:
            self._reads.run(lambda: self._read(spans))

    def _read(self, spans: Sequence[tuple[int, memoryview]]) -> None:
        with self._files.in_use(0) as descriptor:
            # All spans are requested at once, so that the disk works on them in parallel.
            for offset, buffer in spans:
                with self._guard.watching(self._path, offset):
                    os.posix_fadvise(descriptor, offset, len(buffer), os.POSIX_FADV_WILLNEED)
            for offset, buffer in spans:
                self._files.read(0, offset, buffer, self._guard)
            self._files.refuse_change(0)

    def close(self) -> None:
        """Refuse further reads. The descriptor is closed when the last read in progress ends."""
        self._files.close()
        if self._owns_guard:
            self._guard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class GatheredTable(Streams, torch.nn.Parameter):
    """An embedding's weight that stays in its file.

    To torch it is a parameter of the table's shape (rows, width), dtype and device. Looking rows up gives the same
    bits as a table in memory, on the device of the indices. Any other computation reads the whole table if it is
    small, and raises a ``ModelError`` otherwise.
    """

    _source: TableSource
    _offset: int
    _packing: Packing | None
    _row_bytes: int
    """In the file."""

    # torch's functions run unchanged, down to the operations that __torch_dispatch__ gets. So metadata is torch's own,
    # and every computation with the table arrives there.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @staticmethod
    def __new__(
        cls: type[Self],
        source: TableSource,
        *,
        offset: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        packing: Packing | None = None,
        row_bytes: int | None = None,
    ) -> Self:
        """Make a table whose rows are contiguous in the source, from byte ``offset`` on.

        ``shape`` and ``dtype`` are those of the unpacked table; with a ``packing``, ``row_bytes`` is what a row takes in
        the file.
        """
        if len(shape) != 2:  # noqa: PLR2004 - rows and width
            raise ModelError(
                f"An embedding table has rows and a width, not the shape {tuple(shape)}."
            )
        table: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        table._source, table._offset = source, offset
        table._packing = packing
        table._row_bytes = row_bytes or shape[1] * dtype.itemsize
        return table

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"GatheredTable({self._source.path}, offset={self._offset}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Gather rows; other operations get the whole table, if it is small."""
        if func is _aten.embedding.default and isinstance(args[0], cls):
            return args[0]._gather(args[1])  # noqa: SLF001 - of this class
        if func in {_aten.detach.default, _aten.alias.default}:
            return args[0]

        def read_whole(leaf: Any) -> Any:
            if not isinstance(leaf, cls):
                return leaf
            is_written = func._schema.is_mutable and leaf is args[0]  # noqa: SLF001 - no public way to ask
            if leaf.nbytes > SMALL_WEIGHT_BYTES or is_written:
                raise _refusal(str(func))
            # transformers computes with the bytes in the mapped file, and some kernels give other bits at other
            # addresses modulo the widest vectors.
            table = empty_congruent(leaf.shape, leaf.dtype, leaf._offset)  # noqa: SLF001
            return leaf._read(list(range(leaf.shape[0])), table).to(leaf.device)  # noqa: SLF001

        return func(*pytree.tree_map(read_whole, args), **pytree.tree_map(read_whole, kwargs or {}))

    # The next three would give access to the table's memory, which does not exist.

    def __reduce_ex__(self, _: Any) -> Any:
        raise _refusal("pickle or copy")

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
        spans: list[tuple[int, memoryview]] = []
        begin = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or rows[end] != rows[end - 1] + 1:
                span = buffer[begin * stride : end * stride]
                spans.append((self._offset + rows[begin] * stride, span))
                begin = end
        self._source.read_into(spans)
        if self._packing is not None:
            self._packing.unpack([stored], 0, result)
        return result


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
