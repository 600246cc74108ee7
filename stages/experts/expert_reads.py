"""Reads of experts into cells, several at a time."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial

import numpy as np

from layerstream.stages.experts.cells import Cell
from layerstream.stages.experts.expert_set import ExpertRead, ExpertSet
from layerstream.stages.memory import HostMemory, round_up
from layerstream.stages.readers.direct import BLOCK_BYTES
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.protocol import Reader
from layerstream.stages.threads import Threads

__all__ = ["ExpertReads"]


class ExpertReads:
    """Threads that read experts, each by way of a buffer of its own.

    Args:
        reader: The files.
        guard: What fails is repeated with its patience.
        file_bytes: The size of each file.
        threads: How many requests are in flight.
        request_bytes: The size of the largest one.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        guard: ReadGuard,
        file_bytes: Sequence[int],
        threads: int,
        request_bytes: int,
    ) -> None:
        self._reader = reader
        self._file_bytes = tuple(file_bytes)
        self._guard = guard
        self._request_bytes = request_bytes
        self._lock = threading.Lock()
        self._bytes = 0
        self._staging = threading.local()
        self._buffers = ExitStack()
        self._threads = Threads("experts", threads)

    @property
    def nbytes(self) -> int:
        """How many bytes have been read so far."""
        with self._lock:
            return self._bytes

    def demand(self, set_index: int, experts: Sequence[int]) -> None:
        """Nothing to do: what is read is kept nowhere else."""

    def begin(self, cell: Cell, experts: ExpertSet, expert: int) -> list[Future[None]]:
        """Queue the reads of ``expert`` into ``cell``."""
        reads = experts.reads(
            expert, request_bytes=self._request_bytes, file_bytes=self._file_bytes
        )
        return [self._threads.submit(self._read, each, cell, experts, expert) for each in reads]

    def _read(self, read: ExpertRead, cell: Cell, experts: ExpertSet, expert: int) -> None:
        staging = self._staging_buffer()
        padded = round_up(read.extent.nbytes, BLOCK_BYTES)
        try:
            self._guard.patiently(
                partial(self._reader.read, read.extent, memoryview(staging.data)[:padded])
            )
        except Exception as error:
            error.add_note(f"layerstream: reading expert {expert} of {experts.module}")
            raise
        # numpy copies in this thread alone; torch would make a team of threads for each of ours.
        into = cell.tensor.numpy()
        for offset, cell_offset, nbytes in read.copies:
            np.copyto(into[cell_offset : cell_offset + nbytes], staging[offset : offset + nbytes])
        with self._lock:
            self._bytes += read.extent.nbytes

    def _staging_buffer(self) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """This thread's own buffer for one request: direct reads want aligned memory, tensors their own alignment."""
        known: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = getattr(
            self._staging, "buffer", None
        )
        if known is None:
            memory = HostMemory(self._request_bytes)
            with self._lock:
                self._buffers.callback(memory.close)
            known = self._staging.buffer = memory.tensor.numpy()
        return known

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """Fail the reads in progress, and wait for none of them any more; whether there are any. See ``Threads``."""
        return self._threads.abandon(error)

    def close(self) -> None:
        """Wait for reads that have begun and were not abandoned, and free the buffers."""
        self._threads.close()
        self._buffers.close()
