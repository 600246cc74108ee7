"""A memory cgroup that holds a child process below a limit, where this machine lets us make one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from layerstream.tools.compare import cgroups
from layerstream.tools.compare.cgroups import CgroupError, MemoryCgroup

__all__ = ["memory_cgroup", "run_in"]


@contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """A fresh memory cgroup; skips the test, with the reason, where none can be made."""
    try:
        made = cgroups.memory_cgroup()
        group = made.__enter__()
    except CgroupError as error:
        pytest.skip(str(error))
    try:
        yield group
    finally:
        made.__exit__(None, None, None)


def run_in(
    group: MemoryCgroup, program: str, *arguments: str, limit_bytes: int, seconds: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run a Python ``program`` inside ``group``, held to ``limit_bytes``."""
    group.limit(limit_bytes)
    return subprocess.run(
        group.inside([sys.executable, "-c", program, *arguments]),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
