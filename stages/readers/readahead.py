"""Brings files into the page cache in the background, before they are needed."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

from layerstream.stages.process.headroom import MARGIN, host_available_bytes
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.threads import Threads

__all__ = ["Readahead", "fits_page_cache"]

logger = logging.getLogger(__name__)

# Requested at a time: stopping takes no longer than one request.
_STEP_BYTES = 8 << 20


def fits_page_cache(nbytes: int) -> bool:
    """Whether the page cache may hold ``nbytes`` without taking memory that processes need."""
    return nbytes <= host_available_bytes() * (1 - MARGIN)


class Readahead:
    """Requests files from the system, in order, in a thread of its own; a context manager.

    Importing code and tracing a model take seconds in which the disk would idle. Errors are left to the reader
    that is opened later.

    Args:
        paths: The files.
        guard: Watches over the requests, which block where the disk's queue is full.
    """

    def __init__(self, paths: Sequence[Path], guard: ReadGuard | None = None) -> None:
        self._paths = tuple(paths)
        self._guard = guard
        self._stopping = False
        self._threads: Threads | None = None
        self._running: Future[None] | None = None

    def start(self) -> None:
        """Start the thread.

        Raises:
            DeviceError: The system starts no more threads.
        """
        if hasattr(os, "posix_fadvise"):
            self._threads = Threads("readahead", 1)
            if self._guard is not None:
                self._guard.give_up_when_stopped(self._threads)
            self._running = self._threads.submit(self._run)

    def stop(self) -> None:
        """Request nothing more, and wait for the thread to end, unless it was given up."""
        self._stopping = True
        if self._threads is not None:
            self._threads.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        for path in self._paths:
            try:
                self._request(path)
            except OSError as error:
                logger.debug("%s is not read ahead: %s", path, error)

    def _watching(self, path: Path, offset: int) -> AbstractContextManager[None]:
        return nullcontext() if self._guard is None else self._guard.watching(path, offset)

    def _request(self, path: Path) -> None:
        with self._watching(path, 0):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset in range(0, os.fstat(descriptor).st_size, _STEP_BYTES):
                if self._stopping:
                    return
                with self._watching(path, offset):
                    os.posix_fadvise(descriptor, offset, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
