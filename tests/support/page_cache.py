"""Which pages of a file are in the page cache, and how to drop them from it."""

import ctypes
import mmap
import os

__all__ = ["cached_pages", "drop_from_cache"]


def drop_from_cache(path):
    """Drop ``path`` from the page cache, as far as the filesystem does so."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cached_pages(path):
    """Pages of ``path`` in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with path.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    first = ctypes.c_char.from_buffer(mapping)
    pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
    assert libc.mincore(ctypes.addressof(first), len(mapping), pages) == 0
    del first
    mapping.close()
    return sum(page & 1 for page in pages)
