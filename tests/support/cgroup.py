"""A memory cgroup that limits a child process, on machines where one can be made."""

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
    """Make a memory cgroup; skips the test, with the reason, if none can be made."""
    try:
        context = cgroups.memory_cgroup()
        group = context.__enter__()
    except CgroupError as error:
        pytest.skip(str(error))
    try:
        yield group
    finally:
        context.__exit__(None, None, None)


def run_in(
    group: MemoryCgroup, program: str, *arguments: str, limit_bytes: int, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a Python ``program`` inside ``group``, limited to ``limit_bytes``."""
    group.limit(limit_bytes)
    return subprocess.run(
        group.inside([sys.executable, "-c", program, *arguments]),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
