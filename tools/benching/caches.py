"""The page cache, emptied before a cold pass."""

import os
from collections.abc import Iterable
from pathlib import Path

from layerstream.tools.benching.cgroups import MemoryCgroup

__all__ = ["drop_page_cache", "how_caches_are_dropped"]

_DROP = Path("/proc/sys/vm/drop_caches")


def how_caches_are_dropped() -> str:
    """What this process may do."""
    if os.access(_DROP, os.W_OK):
        return "drop_caches"
    return "posix_fadvise"


def drop_page_cache(folders: Iterable[Path], group: MemoryCgroup | None) -> None:
    """Empty the page cache: all of it where we may, else what the files in ``folders`` have there.

    Args:
        folders: folders or files.
        group: where given, what its processes have mapped goes too; nothing else drops that.
    """
    os.sync()  # dirty pages stay otherwise
    if group is not None:
        group.reclaim()
    if how_caches_are_dropped() == "drop_caches":
        _DROP.write_text("1")
        return
    for folder in folders:
        for path in folder.rglob("*") if folder.is_dir() else [folder]:
            if path.is_file():
                _forget(path)


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
