"""Brings files into the page cache while something else goes on that does not need them yet."""

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from layerstream.stages.headroom import MARGIN, host_available_bytes

__all__ = ["Readahead", "fits_page_cache"]

logger = logging.getLogger(__name__)

# So long an extent is asked for at a time: stopping takes no longer than asking for it.
_STEP_BYTES = 8 << 20


def fits_page_cache(nbytes: int) -> bool:
    """Whether the page cache may hold so much without pushing anything out that a process needs."""
    return nbytes <= host_available_bytes() * (1 - MARGIN)


class Readahead:
    """Asks the system for files, in order, in a thread of its own, as a context manager.

    Loading code and tracing a model take seconds in which the disk would idle. It only asks: what cannot be read
    will be noticed by whoever reads it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="layerstream-readahead", daemon=True)

    def start(self) -> None:
        """Begin."""
        if hasattr(os, "posix_fadvise"):
            self._thread.start()

    def stop(self) -> None:
        """Ask for nothing more, and wait for the thread to end."""
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
                self._ask_for(path)
            except OSError as error:
                logger.debug("%s is not read ahead: %s", path, error)

    def _ask_for(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset in range(0, os.fstat(descriptor).st_size, _STEP_BYTES):
                if self._stopping:
                    return
                os.posix_fadvise(descriptor, offset, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
