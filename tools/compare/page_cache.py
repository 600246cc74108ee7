"""Drops weights from the page cache before a cold pass. Code and other cached files stay."""

import ctypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["drop_from_cache"]

_PROCESS_MADVISE = 440  # the same on every architecture
_MADV_PAGEOUT = 21
_MAX_BYTES = 1 << 30  # per call: the kernel accepts just under 2 GiB


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def drop_from_cache(paths: Iterable[Path], pids: Iterable[int] = ()) -> bool:
    """Drop the files at ``paths`` from the page cache.

    Args:
        paths: Files, or folders with all files in them.
        pids: Processes that may have mapped them: mapped pages stay in the cache until they are paged out.

    Returns:
        Whether all mapped pages were dropped: paging out another process requires CAP_SYS_NICE, as root has.
    """
    files = {
        file.resolve()
        for path in paths
        for file in (path.rglob("*") if path.is_dir() else [path])
        if file.is_file()
    }
    os.sync()  # dirty pages would stay
    all_dropped = all(_page_out(pid, files) for pid in pids)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return all_dropped


def _page_out(pid: int, files: set[Path]) -> bool:
    ranges = list(_mapped_ranges(pid, files))
    if not ranges:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        for start, nbytes in ranges:
            pages = ctypes.byref(_Range(start, nbytes))
            if libc.syscall(_PROCESS_MADVISE, process, pages, 1, _MADV_PAGEOUT, 0) < 0:
                return False
    finally:
        os.close(process)
    return True


def _mapped_ranges(pid: int, files: set[Path]) -> Iterator[tuple[int, int]]:
    """Ranges (address, bytes) of the address space of ``pid`` that map one of ``files``."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:  # no permission, or it has ended
        return
    for line in lines:
        addresses, *_, path = line.split(maxsplit=5)
        if Path(path) in files:
            start, stop = (int(part, 16) for part in addresses.split("-"))
            for piece in range(start, stop, _MAX_BYTES):
                yield piece, min(_MAX_BYTES, stop - piece)
