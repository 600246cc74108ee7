"""Brings files into the page cache in the background, before they are needed."""

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from layerstream.stages.process.headroom import MARGIN, host_available_bytes

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
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="layerstream-readahead", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        if hasattr(os, "posix_fadvise"):
            self._thread.start()

    def stop(self) -> None:
        """Request nothing more, and wait for the thread to end."""
        self._stopping = True
        if self._thread.ident is not None:
            self._thread.join()

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

    def _request(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset in range(0, os.fstat(descriptor).st_size, _STEP_BYTES):
                if self._stopping:
                    return
                os.posix_fadvise(descriptor, offset, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
