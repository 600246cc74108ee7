"""The page cache, emptied of weights before a cold pass. Code and whatever else is cached stays there."""

import ctypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["drop_from_cache"]

_PROCESS_MADVISE = 440  # the same on every architecture
_MADV_PAGEOUT = 21
_MOST_BYTES = 1 << 30  # of one call: the kernel takes just under 2 GiB


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def drop_from_cache(places: Iterable[Path], pids: Iterable[int] = ()) -> bool:
    """Drop the files at ``places`` from the page cache.

    Args:
        places: Files, or folders with all files in them.
        pids: Of processes that may have mapped them: what is mapped stays in the cache until it is paged out.

    Returns:
        Whether nothing mapped was left: paging out what another process has mapped takes CAP_SYS_NICE, as root has.
    """
    files = {
        file.resolve()
        for place in places
        for file in (place.rglob("*") if place.is_dir() else [place])
        if file.is_file()
    }
    os.sync()  # what is dirty would stay
    done = all(_page_out(pid, files) for pid in pids)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return done


def _page_out(pid: int, files: set[Path]) -> bool:
    ranges = list(_mapped(pid, files))
    if not ranges:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        for start, nbytes in ranges:
            one = _Range(start, nbytes)
            said = libc.syscall(_PROCESS_MADVISE, process, ctypes.byref(one), 1, _MADV_PAGEOUT, 0)
            if said < 0:
                return False
    finally:
        os.close(process)
    return True


def _mapped(pid: int, files: set[Path]) -> Iterator[tuple[int, int]]:
    """Pieces of the address space of ``pid`` that map one of ``files``: address, bytes."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not ours to look at
        return
    for line in lines:
        addresses, *_, path = line.split(maxsplit=5)
        if Path(path) in files:
            start, stop = (int(part, 16) for part in addresses.split("-"))
            for piece in range(start, stop, _MOST_BYTES):
                yield piece, min(_MOST_BYTES, stop - piece)
