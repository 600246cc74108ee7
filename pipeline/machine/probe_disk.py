"""Measures how fast the files on a volume are read, with each reader that the pipeline may use."""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.volumes import data_ranges, windows
from layerstream.stages.batch import Extent
from layerstream.stages.memory import HostMemory
from layerstream.stages.readers.direct import BLOCK_BYTES, DirectReader
from layerstream.stages.readers.mapped import MmapReader
from layerstream.stages.text import format_bytes
from layerstream.stages.threads import Threads

__all__ = ["LEAST_BYTES", "cached_bytes", "measure_direct", "measure_mmap"]

logger = logging.getLogger(__name__)

# The same as the planner's, so that what is measured is what will run.
_REQUEST_BYTES = 8 << 20
_REQUESTS = 4
# Limits for each reader, whichever is reached first: short enough for the start of a service. Mapped files fill the page
# cache, so they get little; a disk with 3 GB/s would read 256 MiB before it reaches its steady rate.
_MOST_DIRECT_BYTES = 1 << 30
_MOST_MAPPED_BYTES = 256 << 20
_MOST_SECONDS = 0.4
# Files are read in runs of many requests; the runs are scattered, so that no single place decides.
_WINDOW_BYTES = 64 << 20
# With less data than this, latency would be measured instead of a rate.
LEAST_BYTES = 64 << 20
# One request of this size detects slow disks, which then get small requests, so that the time limit is kept.
_PILOT_BYTES = 1 << 20
# Samples are groups of completed requests: of two rounds of all threads, since requests that were made together
# end together, and no more than this many.
_ROUNDS = 2
_MOST_SAMPLES = 8
# At most this much of the page cache that others have filled is dropped for a sample.
_MOST_EVICTED_BYTES = 128 << 20
# Checking every page of a large checkpoint would take seconds. Pages come and go in runs, so samples are enough.
_LOOKS = 2048
_LOOK_BYTES = 64 << 10


class _Done(NamedTuple):
    """One completed request."""

    end: float
    nbytes: int
    cpu_seconds: float


def measure_direct(paths: Sequence[Path], files: Sequence[int]) -> Mapping[str, Rate]:
    """Direct reads into huge pages: bytes per second, and processor seconds per byte.

    Args:
        paths: The files of the checkpoint.
        files: Indices of those on the volume to measure.

    Returns:
        Rates by the names of Hardware's fields; none if there is too little data.

    Raises:
        LayerstreamError, OSError: The disk fails.
    """
    chosen = _chosen(paths, files)
    if not chosen:
        return {}
    memory = HostMemory(_REQUESTS * _REQUEST_BYTES)
    try:
        memory.tensor.zero_()  # so that pages are allocated before time is measured
        buffer = memory.tensor.numpy().data
        places = [
            buffer[number * _REQUEST_BYTES : (number + 1) * _REQUEST_BYTES]
            for number in range(_REQUESTS)
        ]
        reader = DirectReader(paths)
        try:
            done = _burst(
                lambda worker, extent: reader.read(extent, places[worker][: extent.nbytes]),
                _within(chosen, _MOST_DIRECT_BYTES),
            )
        finally:
            reader.close()
        if reader.falls_back:
            logger.info("the rate of direct reads is that of buffered ones, as they will run here")
    finally:
        memory.close()
    return {"disk_bytes_per_second": done[0], "direct_read_cpu_seconds_per_byte": done[1]}


def measure_mmap(paths: Sequence[Path], files: Sequence[int]) -> Mapping[str, Rate]:
    """Faulting in mapped files that are not in the page cache. As ``measure_direct``.

    The pages that it brought in stay: they are weights, and may be needed next.
    """
    chosen = _chosen(paths, files)
    if not chosen:
        return {}
    reader = MmapReader(paths)
    try:
        cold = _cold(reader, chosen)
        nbytes = sum(extent.nbytes for extent in cold)
        if nbytes < LEAST_BYTES // 2:
            logger.info(
                "%s: the rate of mapped files is not measured: all but %s of what was looked at is in the "
                "page cache, or the system does not tell",
                paths[files[0]].parent,
                format_bytes(nbytes),
            )
            return {}
        done = _burst(lambda _, extent: reader.fault_in(extent), cold)
        if not reader.resident_bytes(cold[0]):
            logger.info("this kernel has no MADV_POPULATE_READ: mapped files are not measured")
            return {}
    finally:
        reader.close()
    return {"mmap_bytes_per_second": done[0], "mmap_read_cpu_seconds_per_byte": done[1]}


def cached_bytes(paths: Sequence[Path]) -> int:
    """How much of ``paths`` is in the page cache, from samples if they are large; 0 if the kernel does not say.

    Raises:
        LayerstreamError, OSError: A file cannot be opened.
    """
    reader = MmapReader(paths)
    try:
        sizes = [path.stat().st_size for path in paths]
        looks = _looks(sizes)
        there = sum(reader.resident_bytes(look) or 0 for look in looks)
        looked_at = sum(look.nbytes for look in looks)
        return int(sum(sizes) * min(1, there / looked_at)) if looked_at else 0
    finally:
        reader.close()


def _looks(sizes: Sequence[int]) -> list[Extent]:
    """Pieces evenly spread over files of these sizes; the whole files if they are small."""
    stride = max(1, sum(sizes) // (_LOOKS * _LOOK_BYTES)) * _LOOK_BYTES
    # Not from the beginning: headers were just read, so they are in memory in any case.
    at = stride // 2 if stride > _LOOK_BYTES else 0
    looks = []
    for file, size in enumerate(sizes):
        while at < size:
            begin = at // BLOCK_BYTES * BLOCK_BYTES
            looks.append(Extent(file=file, offset=begin, nbytes=min(_LOOK_BYTES, size - begin)))
            at += stride
        at -= size
        if stride == _LOOK_BYTES:
            at = 0
    return looks


def _chosen(paths: Sequence[Path], files: Sequence[int]) -> list[Extent]:
    """Windows of data in random order; none if there is too little data."""
    ranges = {file: data_ranges(paths[file]) for file in files}
    found = [
        window
        for file, pieces in ranges.items()
        for window in windows(
            pieces, file=file, window_bytes=_WINDOW_BYTES, least_bytes=_REQUEST_BYTES
        )
    ]
    data = sum(window.nbytes for window in found)
    if data < LEAST_BYTES:
        size = sum(paths[file].stat().st_size for file in files)
        logger.info(
            "%s: the disk is not measured: %s",
            paths[files[0]].parent,
            f"its files are sparse, with {format_bytes(data)} of data in {format_bytes(size)}"
            if size >= LEAST_BYTES
            else f"{format_bytes(size)} are too little to show a rate",
        )
        return []
    random.shuffle(found)
    return found


def _cold(reader: MmapReader, chosen: Sequence[Extent]) -> list[Extent]:
    """Windows of which no page is in memory. If there are too few, some are dropped from the page cache."""
    cold: list[Extent] = []
    warm: list[Extent] = []
    for window in chosen[:64]:
        if len(cold) * _WINDOW_BYTES >= _MOST_MAPPED_BYTES:
            break
        resident = reader.resident_bytes(window)
        if resident is not None:
            (warm if resident else cold).append(window)
    if sum(window.nbytes for window in cold) < LEAST_BYTES // 2:
        for window in _within(warm, _MOST_EVICTED_BYTES):
            reader.evict(window)
            if reader.resident_bytes(window) == 0:
                cold.append(window)
    return _within(cold, _MOST_MAPPED_BYTES)


def _within(windows: Sequence[Extent], nbytes: int) -> list[Extent]:
    """The first of ``windows``, up to ``nbytes`` in sum."""
    found, total = [], 0
    for window in windows:
        total += window.nbytes
        if total > nbytes:
            break
        found.append(window)
    return found


def _burst(read: Callable[[int, Extent], None], chosen: Sequence[Extent]) -> tuple[Rate, Rate]:
    """Call ``read(worker, extent)`` for requests of ``chosen``, several at a time, up to the time limit.

    Returns:
        Bytes per second, and processor seconds per byte.
    """
    pilot = Extent(file=chosen[0].file, offset=chosen[0].offset, nbytes=_PILOT_BYTES)
    began = time.perf_counter()
    read(0, pilot)
    slow = (time.perf_counter() - began) * _REQUEST_BYTES / _PILOT_BYTES > _MOST_SECONDS
    size = _PILOT_BYTES if slow else _REQUEST_BYTES
    requests = iter(
        [
            Extent(
                file=window.file, offset=window.offset + at, nbytes=min(size, window.nbytes - at)
            )
            for window in chosen
            for at in range(0, window.nbytes, size)
        ][1:]  # the first request has read this
    )
    lock = threading.Lock()
    began = time.perf_counter()

    def work(worker: int) -> list[_Done]:
        done: list[_Done] = []
        # At least one request, however late a busy machine starts the threads.
        while not done or time.perf_counter() - began < _MOST_SECONDS:
            with lock:
                request = next(requests, None)
            if request is None:
                break
            cpu = time.thread_time()
            read(worker, request)
            cpu = time.thread_time() - cpu
            done.append(_Done(time.perf_counter(), request.nbytes, cpu))
        return done

    threads = Threads("probe", _REQUESTS)
    try:
        calls = [threads.submit(work, worker) for worker in range(_REQUESTS)]
        done = sorted(each for call in calls for each in call.result())
    finally:
        threads.close()
    return _rates(done, began)


def _rates(done: Sequence[_Done], began: float) -> tuple[Rate, Rate]:
    count = max(1, min(_MOST_SAMPLES, len(done) // (_ROUNDS * _REQUESTS)))
    bounds = [len(done) * number // count for number in range(count + 1)]
    per_second, per_byte = [], []
    for first, last in pairwise(bounds):
        group = done[first:last]
        nbytes = sum(each.nbytes for each in group)
        per_second.append(nbytes / max(group[-1].end - began, 1e-9))
        per_byte.append(sum(each.cpu_seconds for each in group) / nbytes)
        began = group[-1].end
    return Rate.of(per_second), Rate.of(per_byte)
