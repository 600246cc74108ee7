"""What the libraries under torch keep of this process's memory for themselves, and how little of it is enough."""

import ctypes
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["KERNELS_KEPT", "Leftovers", "keep_little"]

logger = logging.getLogger(__name__)

# oneDNN compiles a kernel for each shape of 16-bit matrices that it meets, and keeps 1024 of them. Prompts of 256
# lengths took 580 MB so, whatever the size of the matrices. A block has about six shapes, so this is enough for ten
# requests whose prompts differ in length; one that is missing takes 0.3 ms to make.
KERNELS_KEPT = 64
# torch keeps some of its own in front of that, for each thread: they save no time that could be measured.
_KEPT_PER_THREAD = 1
# glibc gives every thread a heap of its own, up to eight for each core, and what is free at the end of any but the main
# one stays. With two of them requests took 10 to 20 MB less than with 16, and no more time.
_HEAPS = 2
_M_ARENA_MAX = -8  # of malloc.h
# Of the time that passes, what trimming the heap may take: other threads that ask for memory wait for it.
_TRIMMING_SHARE = 0.05


def keep_little() -> None:
    """Have the libraries keep less than they would, in all of this process: it is to stay within a budget.

    Of oneDNN's compiled kernels there are then no more than ``KERNELS_KEPT``. It can only be told by the environment,
    which it looks at when it is first used: in a process that has multiplied 16-bit matrices before, that changes
    nothing. What the environment says already of kernels and heaps is left as it is.
    """
    kernels = os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    if not kernels.isdecimal() or int(kernels) > KERNELS_KEPT:
        logger.warning(
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY is %s, and plans count %d kernels of 0.3 MB: more is beside the budget",
            kernels,
            KERNELS_KEPT,
        )
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(_KEPT_PER_THREAD))
    library = ctypes.CDLL(None)
    said = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if not said and hasattr(library, "mallopt"):  # glibc's own
        library.mallopt(_M_ARENA_MAX, _HEAPS)


class Leftovers:
    """What the C library and MKL keep for later when a request has ended, and nobody uses.

    MKL keeps what it has packed float32 matrices into, for each thread and size: 11 MB a thread. glibc keeps freed
    blocks of up to 32 MiB in its heaps: after the activations of a few requests that was ten times what was in use.
    """

    def __init__(self) -> None:
        libraries = [ctypes.CDLL(None)]
        with suppress(OSError):  # not every build has it under this name
            path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
            libraries.append(ctypes.CDLL(str(path)))
        # The first is what MKL calls it that is linked into torch, the second what it is called from outside.
        names = ("mkl_serv_free_buffers", "MKL_Free_Buffers")
        self._free_buffers: list[Callable[[], object]] = [
            getattr(each, name) for each in libraries for name in names if hasattr(each, name)
        ]
        self._trim: Callable[[int], object] | None = getattr(libraries[0], "malloc_trim", None)
        self._next_trim = 0.0

    def release(self) -> None:
        """Give it back to the system, without the GIL; of the heaps only where that was quick, or is long ago.

        Trimming takes a fifth of a millisecond; but in a process with some hundred thousand holes in its heap 50, for
        which all threads that ask for memory wait.
        """
        for free in self._free_buffers:
            free()
        began = time.perf_counter()
        if self._trim is not None and began >= self._next_trim:
            self._trim(0)
            now = time.perf_counter()
            self._next_trim = now + (now - began) / _TRIMMING_SHARE
