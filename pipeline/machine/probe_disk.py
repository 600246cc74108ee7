"""Measures how fast the files on a volume are read, with each reader that the pipeline may use."""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.volumes import data_ranges, windows
from layerstream.stages.batch import Extent
from layerstream.stages.errors import ReadError
from layerstream.stages.memory import HostMemory
from layerstream.stages.process.headroom import address_space_left
from layerstream.stages.readers.direct import BLOCK_BYTES, DirectReader
from layerstream.stages.readers.mapped import MmapReader
from layerstream.stages.text import format_bytes
from layerstream.stages.threads import Threads

__all__ = ["DIRECT_BYTES", "MIN_BYTES", "cached_bytes", "measure_direct", "measure_mmap"]

logger = logging.getLogger(__name__)

# The same as the planner's, so that the measured requests are those that will be made.
_REQUEST_BYTES = 8 << 20
_REQUESTS = 4
DIRECT_BYTES = _REQUESTS * _REQUEST_BYTES
"""Host memory that measuring direct reads takes."""
# Limits for each reader, whichever is reached first: short enough for the start of a service. Mapped files fill the
# page cache, so their limit is low; direct reads have more, since a disk with 3 GB/s reads 256 MiB before it reaches its
# steady rate.
_MAX_DIRECT_BYTES = 1 << 30
_MAX_MAPPED_BYTES = 256 << 20
_MAX_SECONDS = 0.4
# Then a read is not waited for any longer: a disk that spins up takes ten seconds, a network path that fails over twenty.
_HANGS_AFTER_SECONDS = 30.0
# Files are read in windows of many requests; the windows are scattered, so that no single place decides.
_WINDOW_BYTES = 64 << 20
# With less data than this, latency would be measured instead of bandwidth.
MIN_BYTES = 64 << 20
# One request of this size detects slow disks, which then get small requests, so that the time limit is kept.
_PILOT_BYTES = 1 << 20
# A sample is a group of completed requests, at least two rounds of all threads, since requests that start together
# end together. There are at most this many.
_ROUNDS = 2
_MAX_SAMPLES = 8
# At most this much of the page cache is dropped, since other processes may have filled it.
_MAX_EVICTED_BYTES = 128 << 20
# Checking every page of a large checkpoint would take seconds. Pages come and go in runs, so sampling is enough.
_MAX_CACHE_CHECKS = 2048
_CACHE_CHECK_BYTES = 64 << 10


class _CompletedRead(NamedTuple):
    """One completed request, with the processor time of its thread."""

    end: float
    nbytes: int
    cpu_seconds: float


def measure_direct(paths: Sequence[Path], files: Sequence[int]) -> Mapping[str, Rate]:
    """Measure direct reads into huge pages: bytes per second, and processor seconds per byte.

    Args:
        paths: The files of the checkpoint.
        files: The indices of those on the volume to measure.

    Returns:
        Rates by the names of Hardware's fields; empty if there is too little data.

    Raises:
        LayerstreamError, OSError: A read fails.
    """
    windows = _shuffled_windows(paths, files)
    if not windows:
        return {}
    memory = HostMemory(DIRECT_BYTES)
    try:
        memory.tensor.zero_()  # allocates pages before time is measured
        memory_view = memory.tensor.numpy().data
        buffers = [
            memory_view[number * _REQUEST_BYTES : (number + 1) * _REQUEST_BYTES]
            for number in range(_REQUESTS)
        ]
        reader = DirectReader(paths)
        try:
            rate, cost = _read_concurrently(
                lambda worker, extent: reader.read(extent, buffers[worker][: extent.nbytes]),
                _first_windows(windows, _MAX_DIRECT_BYTES),
            )
        finally:
            reader.close()
        if reader.falls_back:
            logger.info(
                "direct reads are not supported here: their rate is that of buffered ones, as they will run here"
            )
    finally:
        memory.close()
    return {"disk_bytes_per_second": rate, "direct_read_cpu_seconds_per_byte": cost}


def measure_mmap(paths: Sequence[Path], files: Sequence[int]) -> Mapping[str, Rate]:
    """Measure page faults in mapped files that are not in the page cache, like ``measure_direct``.

    The pages that were read stay in the page cache: they are weights, and may be needed next.
    """
    windows = _shuffled_windows(paths, files)
    space = address_space_left()
    if not windows or (space is not None and space < sum(path.stat().st_size for path in paths)):
        return {}
    reader = MmapReader(paths)
    try:
        cold = _uncached_windows(reader, windows)
        nbytes = sum(extent.nbytes for extent in cold)
        if nbytes < MIN_BYTES // 2:
            logger.info(
                "%s: the rate of mapped files is not measured: all but %s of the checked data is in the "
                "page cache, or the system does not tell",
                paths[files[0]].parent,
                format_bytes(nbytes),
            )
            return {}
        rate, cost = _read_concurrently(lambda _, extent: reader.fault_in(extent), cold)
        if not reader.resident_bytes(cold[0]):
            logger.info("this kernel has no MADV_POPULATE_READ: mapped files are not measured")
            return {}
    finally:
        reader.close()
    return {"mmap_bytes_per_second": rate, "mmap_read_cpu_seconds_per_byte": cost}


def cached_bytes(paths: Sequence[Path]) -> int:
    """Return how much of ``paths`` is in the page cache, from samples if they are large; 0 if the kernel does not say.

    Raises:
        LayerstreamError, OSError: A file cannot be opened.
    """
    reader = MmapReader(paths)
    try:
        sizes = [path.stat().st_size for path in paths]
        extents = _evenly_spread_extents(sizes)
        resident = sum(reader.resident_bytes(extent) or 0 for extent in extents)
        checked = sum(extent.nbytes for extent in extents)
        return int(sum(sizes) * min(1, resident / checked)) if checked else 0
    finally:
        reader.close()


def _evenly_spread_extents(sizes: Sequence[int]) -> list[Extent]:
    """Return extents that are evenly spread over files of these sizes, or the whole files if they are small."""
    stride = max(1, sum(sizes) // (_MAX_CACHE_CHECKS * _CACHE_CHECK_BYTES)) * _CACHE_CHECK_BYTES
    # Not from the start: headers were just read, so they are in memory in any case.
    at = stride // 2 if stride > _CACHE_CHECK_BYTES else 0
    extents = []
    for file, size in enumerate(sizes):
        while at < size:
            begin = at // BLOCK_BYTES * BLOCK_BYTES
            extents.append(
                Extent(file=file, offset=begin, nbytes=min(_CACHE_CHECK_BYTES, size - begin))
            )
            at += stride
        at -= size
        if stride == _CACHE_CHECK_BYTES:
            at = 0
    return extents


def _shuffled_windows(paths: Sequence[Path], files: Sequence[int]) -> list[Extent]:
    """Return windows of data in random order; none if there is too little data."""
    ranges = {file: data_ranges(paths[file]) for file in files}
    found = [
        window
        for file, pieces in ranges.items()
        for window in windows(
            pieces, file=file, window_bytes=_WINDOW_BYTES, min_bytes=_REQUEST_BYTES
        )
    ]
    data = sum(window.nbytes for window in found)
    if data < MIN_BYTES:
        size = sum(paths[file].stat().st_size for file in files)
        logger.info(
            "%s: the disk is not measured: %s",
            paths[files[0]].parent,
            f"its files are sparse, with {format_bytes(data)} of data in {format_bytes(size)}"
            if size >= MIN_BYTES
            else f"{format_bytes(size)} are too little to show a rate",
        )
        return []
    random.shuffle(found)
    return found


def _uncached_windows(reader: MmapReader, windows: Sequence[Extent]) -> list[Extent]:
    """Return windows of which no page is in memory; if there are too few, some are dropped from the page cache."""
    cold: list[Extent] = []
    warm: list[Extent] = []
    for window in windows[:64]:
        if len(cold) * _WINDOW_BYTES >= _MAX_MAPPED_BYTES:
            break
        resident = reader.resident_bytes(window)
        if resident is not None:
            (warm if resident else cold).append(window)
    if sum(window.nbytes for window in cold) < MIN_BYTES // 2:
        for window in _first_windows(warm, _MAX_EVICTED_BYTES):
            reader.evict(window)
            if reader.resident_bytes(window) == 0:
                cold.append(window)
    return _first_windows(cold, _MAX_MAPPED_BYTES)


def _first_windows(windows: Sequence[Extent], max_bytes: int) -> list[Extent]:
    """Return the first of ``windows``, of at most ``max_bytes`` in total."""
    found, total = [], 0
    for window in windows:
        total += window.nbytes
        if total > max_bytes:
            break
        found.append(window)
    return found


def _read_concurrently(
    read: Callable[[int, Extent], None], windows: Sequence[Extent]
) -> tuple[Rate, Rate]:
    """Call ``read(worker, extent)`` for requests of ``windows``, several at a time, up to the time limit.

    Returns:
        Bytes per second, and processor seconds per byte.
    """
    pilot = Extent(file=windows[0].file, offset=windows[0].offset, nbytes=_PILOT_BYTES)
    began = time.perf_counter()
    read(0, pilot)
    slow = (time.perf_counter() - began) * _REQUEST_BYTES / _PILOT_BYTES > _MAX_SECONDS
    size = _PILOT_BYTES if slow else _REQUEST_BYTES
    requests = iter(
        [
            Extent(
                file=window.file, offset=window.offset + at, nbytes=min(size, window.nbytes - at)
            )
            for window in windows
            for at in range(0, window.nbytes, size)
        ][1:]  # the pilot has read this
    )
    lock = threading.Lock()
    began = time.perf_counter()

    def work(worker: int) -> list[_CompletedRead]:
        done: list[_CompletedRead] = []
        # At least one request, however late a busy machine starts the threads.
        while not done or time.perf_counter() - began < _MAX_SECONDS:
            with lock:
                request = next(requests, None)
            if request is None:
                break
            cpu = time.thread_time()
            read(worker, request)
            cpu = time.thread_time() - cpu
            done.append(_CompletedRead(time.perf_counter(), request.nbytes, cpu))
        return done

    threads = Threads("probe", _REQUESTS)
    try:
        calls = [threads.submit(work, worker) for worker in range(_REQUESTS)]
        if wait(calls, _MAX_SECONDS + _HANGS_AFTER_SECONDS).not_done:
            threads.abandon(
                lambda: ReadError(
                    f"a read has not returned for {_HANGS_AFTER_SECONDS:.0f} s: the disk or its network hangs"
                )
            )
        done = sorted(each for call in calls for each in call.result())
    finally:
        threads.close()
    return _rates_of_reads(done, began)


def _rates_of_reads(done: Sequence[_CompletedRead], began: float) -> tuple[Rate, Rate]:
    """Summarize completed requests as bytes per second, and processor seconds per byte."""
    count = max(1, min(_MAX_SAMPLES, len(done) // (_ROUNDS * _REQUESTS)))
    bounds = [len(done) * number // count for number in range(count + 1)]
    per_second, per_byte = [], []
    for first, last in pairwise(bounds):
        group = done[first:last]
        nbytes = sum(each.nbytes for each in group)
        per_second.append(nbytes / max(group[-1].end - began, 1e-9))
        per_byte.append(sum(each.cpu_seconds for each in group) / nbytes)
        began = group[-1].end
    return Rate.from_samples(per_second), Rate.from_samples(per_byte)
