"""How much host memory a process may still take."""

import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

__all__ = ["MARGIN", "address_space_left", "host_available_bytes"]

# The share of free memory that is left to other processes and to the allocators' overhead.
MARGIN = 0.1


def host_available_bytes(process: Path = Path("/proc/self")) -> int:
    """Host RAM that a process may still take: the minimum over the system and each of its cgroups.

    A cgroup's page cache can be reclaimed, so it counts as free.

    Args:
        process: Its folder in /proc.
    """
    return max(0, min([psutil.virtual_memory().available, *_cgroup_headrooms(process)]))


def address_space_left() -> int | None:
    """Address space that this process may still take, for memory and mappings of files; None if there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - psutil.Process().memory_info().vms)


def _cgroup_headrooms(process: Path) -> Iterator[int]:
    try:
        lines = (process / "cgroup").read_text().splitlines()
        mounts = [line.split() for line in (process / "mounts").read_text().splitlines()]
    except OSError:  # not Linux, or no cgroups
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield from _headrooms(_mounted(mounts, "cgroup2", None), group, _V2)
        elif "memory" in controllers.split(","):
            yield from _headrooms(_mounted(mounts, "cgroup", "memory"), group, _V1)


_V1 = (
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    "total_active_file",
)
# Besides the pages of files, the kernel can reclaim slabs: cached directory entries and inodes.
_V2 = (
    ("memory.max", "memory.high"),
    "memory.current",
    "inactive_file",
    "active_file",
    "slab_reclaimable",
)


def _mounted(mounts: Sequence[Sequence[str]], kind: str, controller: str | None) -> Path | None:
    for _, where, filesystem, options, *_ in mounts:
        if filesystem == kind and (controller is None or controller in options.split(",")):
            return Path(where)
    return None


def _headrooms(
    root: Path | None, group: str, names: tuple[tuple[str, ...], str, *tuple[str, ...]]
) -> Iterator[int]:
    if root is None:
        return
    limits, usage, *cached = names
    folder = root / group.lstrip("/")
    # Inside a container the path may be the host's: then the mount's root is our own group.
    for level in [folder, *folder.parents] if folder.is_dir() else [root]:
        if not level.is_relative_to(root):
            return
        try:
            stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
            used = int((level / usage).read_text()) - sum(int(stat.get(name, 0)) for name in cached)
        except (OSError, ValueError):
            continue
        for name in limits:
            try:
                yield int((level / name).read_text()) - used
            except (OSError, ValueError):  # "max", or not there
                continue
