"""How much memory this process takes, as the kernel counts it."""

import ctypes
from pathlib import Path

__all__ = ["anonymous_bytes", "trim_heap"]


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process, page-locked memory included; None where unknown.

    Pages of mapped files do not count: the kernel takes them back when it needs them.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = dict(line.partition(":")[::2] for line in status.splitlines())
    return sum(
        int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields
    )


def trim_heap() -> None:
    """Give what is free in the C library's heaps back to the system.

    glibc keeps freed blocks of up to 32 MiB in a heap for each thread: after the activations of a few requests, in
    as many threads, that was ten times what was in use. Takes a millisecond or two, without the GIL.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)
