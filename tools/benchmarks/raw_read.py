"""A lower bound: how fast files can be read from disk at all."""

import itertools
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from layerstream.stages.memory import HostMemory
from layerstream.stages.readers.direct import BLOCK_BYTES

__all__ = ["GRID", "best_raw_read", "raw_read"]

# Block sizes in bytes, and threads: the best of these is the disk's bandwidth.
GRID = tuple(itertools.product((1 << 20, 4 << 20, 8 << 20, 16 << 20), (1, 2, 4)))


def raw_read(
    paths: Sequence[Path], *, block_bytes: int, threads: int, limit_bytes: int | None = None
) -> float:
    """Measure bytes per second of O_DIRECT reads of whole blocks of ``paths``, in order, into huge pages.

    Args:
        paths: The files.
        block_bytes: Size of one read.
        threads: Reads in flight.
        limit_bytes: About how much to read at most; None reads all.
    """
    memory = HostMemory(block_bytes * threads)
    buffer = memory.tensor.numpy().data
    descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    jobs = [
        (descriptor, offset, min(block_bytes, whole - offset))
        for path, descriptor in zip(paths, descriptors, strict=True)
        if (whole := path.stat().st_size // BLOCK_BYTES * BLOCK_BYTES)
        for offset in range(0, whole, block_bytes)
    ]
    if limit_bytes is not None:
        jobs = jobs[: -(-limit_bytes // block_bytes)]
    queue, lock = iter(jobs), threading.Lock()

    def read_jobs(thread: int) -> None:
        target = buffer[thread * block_bytes :]
        while True:
            with lock:
                job = next(queue, None)
            if job is None:
                return
            descriptor, offset, nbytes = job
            done = 0
            while done < nbytes:
                done += os.preadv(descriptor, [target[done:nbytes]], offset + done)

    try:
        memory.tensor[:: mmap.PAGESIZE] = 0  # allocate the pages before the clock starts
        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            list(pool.map(read_jobs, range(threads)))
            seconds = time.perf_counter() - began
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        memory.close()
    return sum(nbytes for _, _, nbytes in jobs) / seconds


def best_raw_read(paths: Sequence[Path]) -> float:
    """Measure the best bytes per second over ``GRID``."""
    return max(raw_read(paths, block_bytes=block, threads=threads) for block, threads in GRID)
