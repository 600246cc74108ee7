"""Memory that the libraries under torch keep for themselves, and how to bound it."""

import ctypes
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["KERNELS_KEPT", "LibraryMemory", "has_tile_products", "limit_library_memory"]

logger = logging.getLogger(__name__)

# oneDNN compiles a kernel for each shape of 16-bit matrices, and keeps 1024 of them: prompts of 256 different lengths
# took 580 MB. A block has about five shapes, so this is enough for a decoding step and prompts of three lengths; eight
# at once took 1.06 times the processor time that they took with 64 (median of three alternating runs, 1.02 to 1.17).
KERNELS_KEPT = 24
# torch has a cache of its own in front of that in each thread; it saves no measurable time.
_KEPT_PER_THREAD = 1
# glibc gives threads heaps of their own, up to eight per core, and returns free memory only from the main one. With
# two heaps, requests took 10 to 20 MB less than with 16, and no more time.
_HEAPS = 2
# Once a large block is freed, glibc takes blocks of up to 32 MiB from its heaps, where what was freed before stays
# below what is in use: a gpt2 in float32 took 456 to 599 MiB of a budget of 402 MiB, and 373 if blocks of 4 MiB and more
# are mapped one by one, and gone when they are freed. Activations of experts, whose sizes are all different, leave holes
# that no other fits into: a granitemoe took 62 to 108 MiB from one run to the next with 4 MiB, 59 to 67 with 1 MiB, and
# 55 to 58 with this. Fresh pages cost prompts whose activations are below 4 MiB processor time: 1.00 to 1.12 times as much
# for 128 to 700 tokens and matrices of 2048 or 4096 columns, up to 1.25 times for 1024 columns; others cost the same
# (medians of four or five alternating runs).
_MAPPED_FROM_BYTES = 512 << 10
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h
# The share of time that trimming the heap may take: other threads that allocate wait for it.
_TRIMMING_SHARE = 0.05


def has_tile_products() -> bool:
    """Whether oneDNN multiplies 16-bit matrices by tiles (AMX), for which it compiles larger kernels."""
    asked: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and asked()


def limit_library_memory() -> int | None:
    """Make the libraries keep less, in all of this process, so that it stays within a budget.

    oneDNN then keeps at most ``KERNELS_KEPT`` compiled kernels. It reads that from the environment when it is first
    used, so nothing changes in a process that has multiplied 16-bit matrices before. What the environment already
    sets for kernels, heaps and mapped blocks is left as it is.

    Returns:
        The size in bytes from which the C library maps blocks one by one, so that nothing of them is kept when they are
        freed; None if it may keep all.
    """
    kernels = os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    if not kernels.isdecimal() or int(kernels) > KERNELS_KEPT:
        logger.warning(
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY is %s, and plans count %d kernels: more exceed the budget",
            kernels,
            KERNELS_KEPT,
        )
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(_KEPT_PER_THREAD))
    library = ctypes.CDLL(None)
    taken = set[int]()
    for variable, tunable, option, value in (
        ("MALLOC_ARENA_MAX", "arena_max", _M_ARENA_MAX, _HEAPS),
        ("MALLOC_MMAP_THRESHOLD_", "mmap_threshold", _M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES),
    ):
        set_already = variable in os.environ or tunable in os.environ.get("GLIBC_TUNABLES", "")
        if not set_already and hasattr(library, "mallopt"):  # glibc's own
            library.mallopt(option, value)
            taken.add(option)
    # Another allocator that was preloaded answers calls, but not this one.
    replaced = "malloc" in os.environ.get("LD_PRELOAD", "")
    return _MAPPED_FROM_BYTES if _M_MMAP_THRESHOLD in taken and not replaced else None


class LibraryMemory:
    """Unused memory that the C library and MKL keep after a request has ended.

    MKL keeps the buffers that it packs float32 matrices into, for each thread and size: 11 MB a thread. glibc keeps
    freed blocks of up to 32 MiB in its heaps: after the activations of a few requests, ten times what was in use.
    """

    def __init__(self) -> None:
        libraries = [ctypes.CDLL(None)]
        with suppress(OSError):  # not every build has it under this name
            path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
            libraries.append(ctypes.CDLL(str(path)))
        # The first name is used by the MKL that is linked into torch, the second by a separate MKL library.
        names = ("mkl_serv_free_buffers", "MKL_Free_Buffers")
        self._free_buffers: list[Callable[[], object]] = [
            getattr(each, name) for each in libraries for name in names if hasattr(each, name)
        ]
        self._trim: Callable[[int], object] | None = getattr(libraries[0], "malloc_trim", None)
        self._next_trim = 0.0

    def release(self) -> None:
        """Return the unused memory to the system, without the GIL. Heaps are trimmed less often where that takes long.

        Trimming takes 0.2 ms, but 50 ms in a process with some hundred thousand holes in its heap, and all threads
        that allocate wait for it.
        """
        for free in self._free_buffers:
            free()
        began = time.perf_counter()
        if self._trim is not None and began >= self._next_trim:
            self._trim(0)
            now = time.perf_counter()
            self._next_trim = now + (now - began) / _TRIMMING_SHARE
