"""Describes the machine that a result was measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil

__all__ = ["this_machine"]


def this_machine(folder: Path) -> dict[str, Any]:
    """Processor, cores, memory, system, and the filesystem that ``folder`` is on; units in the keys."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "filesystem": _filesystem(folder),
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _filesystem(folder: Path) -> str:
    """The system's name for the type of the filesystem that holds ``folder``."""
    mounts = [
        each for each in psutil.disk_partitions(all=True) if folder.is_relative_to(each.mountpoint)
    ]
    return (
        max(mounts, key=lambda each: len(each.mountpoint)).fstype
        if mounts
        else "unknown filesystem"
    )
