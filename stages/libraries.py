"""What the libraries under torch keep of this process's memory for themselves, and how little of it is enough."""

import ctypes
import functools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["KERNELS_KEPT", "keep_little", "release_unused"]

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


def keep_little() -> None:
    """Have the libraries keep less than they would, in all of this process: it is to stay within a budget.

    Of oneDNN's compiled kernels there are then no more than ``KERNELS_KEPT``. It can only be told by the environment,
    which it looks at when it is first used: in a process that has multiplied 16-bit matrices before, that changes
    nothing. What the environment says already of kernels and heaps is left as it is.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(_KEPT_PER_THREAD))
    library = ctypes.CDLL(None)
    said = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if not said and hasattr(library, "mallopt"):  # glibc's own
        library.mallopt(_M_ARENA_MAX, _HEAPS)


def release_unused() -> None:
    """Give what the C library and MKL keep for later, and nobody uses, back to the system.

    glibc keeps freed blocks of up to 32 MiB in a heap for each thread: after the activations of a few requests, in
    as many threads, that was ten times what was in use. MKL keeps what it has packed float32 matrices into, for each
    thread and size: 11 MB a thread. Takes a millisecond or two, without the GIL; but in a process with some hundred
    thousand holes in its heap 50 ms, for which other threads that ask for memory wait.
    """
    for release in _releases():
        release()


@functools.cache
def _releases() -> tuple[Callable[[], object], ...]:
    found: list[Callable[[], object]] = []
    libraries = [ctypes.CDLL(None)]
    with suppress(OSError):  # not every build has it under this name
        libraries.append(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")))
    for library in libraries:
        # The first is what MKL calls it that is linked into torch, the second what it is called from outside.
        names = ("mkl_serv_free_buffers", "MKL_Free_Buffers")
        found += [getattr(library, name) for name in names if hasattr(library, name)]
    if hasattr(libraries[0], "malloc_trim"):  # glibc's own
        found.append(functools.partial(libraries[0].malloc_trim, 0))
    return tuple(found)
