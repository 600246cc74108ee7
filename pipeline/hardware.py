"""What this machine has. The only prober."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from layerstream.pipeline.checkpoint import Checkpoint
from layerstream.stages.devices import open_device
from layerstream.stages.threads import finish_in_thread

__all__ = ["Hardware", "host_available_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machine that a plan is made for. Written by hand, it is a what-if."""

    device: str  # "cpu" or "cuda:0"
    host_available_bytes: int
    vram_free_bytes: int | None  # None on a CPU device
    cores: int
    disk_bytes_per_second: float | None = None  # None: not measured
    h2d_bytes_per_second: float | None = None  # None: not measured

    @classmethod
    async def probe(cls, checkpoint: Checkpoint, device: str = "auto") -> Self:
        """Ask this machine what it has free.

        Args:
            checkpoint: the files that will be read.
            device: "auto", "cpu", "cuda" or "cuda:N".

        Raises:
            DeviceError: there is no such device.
        """
        _ = checkpoint  # bandwidths are not measured yet
        return await finish_in_thread(lambda: cls._ask(device))

    @classmethod
    def _ask(cls, device: str) -> Self:
        opened = open_device(device)
        return cls(
            device=str(opened.torch_device),
            host_available_bytes=host_available_bytes(),
            vram_free_bytes=opened.free_bytes(),
            cores=len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
        )


def host_available_bytes(process: Path = Path("/proc/self")) -> int:
    """Host RAM that a process may still take: the least of what the system and each cgroup above it allow.

    A cgroup's page cache can be reclaimed, so it counts as free.

    Args:
        process: the process's folder in /proc.
    """
    return max(0, min([psutil.virtual_memory().available, *_cgroup_headrooms(process)]))


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
_V2 = (("memory.max", "memory.high"), "memory.current", "inactive_file", "active_file")


def _mounted(mounts: Sequence[Sequence[str]], kind: str, controller: str | None) -> Path | None:
    for _, where, filesystem, options, *_ in mounts:
        if filesystem == kind and (controller is None or controller in options.split(",")):
            return Path(where)
    return None


def _headrooms(
    root: Path | None, group: str, names: tuple[tuple[str, ...], str, str, str]
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
