"""Finds the volume that a file is on, and which ranges of a sparse file are stored there."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from layerstream.stages.batch import Extent
from layerstream.stages.memory import round_up
from layerstream.stages.readers.direct import BLOCK_BYTES

__all__ = ["data_ranges", "files_by_volume", "volume_of", "windows"]

# Files have few ranges of data. If one has more than this, the first ones show its rate as well as all.
_MAX_RANGES = 4096


def files_by_volume(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Return the volumes that ``paths`` are on, each with the indices of its files."""
    found: dict[str, list[int]] = {}
    mounts = _mount_points()
    for number, path in enumerate(paths):
        found.setdefault(volume_of(path, mounts), []).append(number)
    return found


def volume_of(path: Path, mounts: Sequence[tuple[Path, str]]) -> str:
    """Return a name for the volume of ``path`` that is the same after a restart, unlike st_dev.

    Args:
        path: A file; links are followed.
        mounts: Pairs of mount point and volume name; later ones hide earlier ones.
    """
    real = path.resolve()
    name, longest = f"device {real.stat().st_dev}", -1
    for point, volume in mounts:
        if len(point.parts) >= longest and real.is_relative_to(point):
            name, longest = volume, len(point.parts)
    return name


def _mount_points(table: Path = Path("/proc/self/mountinfo")) -> list[tuple[Path, str]]:
    try:
        lines = table.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        mount, _, filesystem = line.partition(" - ")
        point, (kind, source, *_) = mount.split()[4], filesystem.split()
        # Spaces are written as octal escapes.
        point = point.encode("latin-1", "replace").decode("unicode_escape")
        found.append((Path(point), f"{kind} {source} on {point}"))
    return found


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """Return pairs of begin and end: the ranges of a file that are on the disk. Holes take no time to read."""
    status = path.stat()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = list(islice(_iterate_data_ranges(descriptor), _MAX_RANGES))
    finally:
        os.close(descriptor)
    # If the filesystem does not report holes, its block count shows them. Compression rarely halves weights.
    if 2 * 512 * status.st_blocks < sum(end - begin for begin, end in found):
        return []
    return found


def _iterate_data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    size, end = os.fstat(descriptor).st_size, 0
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError:  # ENXIO: a hole up to the end
            return
        yield begin, end


def windows(
    ranges: Sequence[tuple[int, int]], *, file: int, window_bytes: int, min_bytes: int
) -> list[Extent]:
    """Split ``ranges`` into extents of whole blocks, of ``min_bytes`` to ``window_bytes``."""
    found = []
    for begin, end in ranges:
        first = round_up(begin, BLOCK_BYTES)
        last = end // BLOCK_BYTES * BLOCK_BYTES
        for at in range(first, last, window_bytes):
            nbytes = min(window_bytes, last - at)
            if nbytes >= min_bytes:
                found.append(Extent(file=file, offset=at, nbytes=nbytes))
    return found
