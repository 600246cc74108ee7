"""Extents of files -> few large reads on block boundaries -> requests of one call each. Pure."""

from collections.abc import Iterator, Sequence

from layerstream.stages.batch import Extent, Read
from layerstream.stages.memory import round_up
from layerstream.stages.readers.direct import BLOCK_BYTES

__all__ = ["coalesce", "requests_of"]

# Reading a gap is cheaper than a second request if it takes less time than the latency of a request:
# 100 microseconds at 2.5 GB/s.
_GAP_BYTES = 256 << 10


def coalesce(extents: Sequence[Extent], file_bytes: Sequence[int]) -> tuple[Read, ...]:
    """A few large reads that cover ``extents``, on block boundaries, sorted by file and offset."""
    spans: list[list[int]] = []  # [file, start, stop]
    for extent in sorted(extents, key=lambda e: (e.file, e.offset)):
        if not extent.nbytes:
            continue
        start = extent.offset // BLOCK_BYTES * BLOCK_BYTES
        stop = min(round_up(extent.offset + extent.nbytes, BLOCK_BYTES), file_bytes[extent.file])
        if spans and spans[-1][0] == extent.file and start <= spans[-1][2] + _GAP_BYTES:
            spans[-1][2] = max(spans[-1][2], stop)
        else:
            spans.append([extent.file, start, stop])
    reads, host_offset = [], 0
    for file, start, stop in spans:
        reads.append(
            Read(file=file, file_offset=start, host_offset=host_offset, nbytes=stop - start)
        )
        host_offset += round_up(stop - start, BLOCK_BYTES)
    return tuple(reads)


def requests_of(reads: Sequence[Read], request_bytes: int) -> Iterator[tuple[Extent, int]]:
    """The extents to read with one call each, and their offsets in the host image."""
    for read in reads:
        for start in range(0, read.nbytes, request_bytes):
            nbytes = min(request_bytes, read.nbytes - start)
            yield (
                Extent(file=read.file, offset=read.file_offset + start, nbytes=nbytes),
                read.host_offset + start,
            )
