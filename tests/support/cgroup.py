"""A memory cgroup that holds a child process below a limit, where this machine lets us make one."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["memory_cgroup", "run_in"]

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@contextmanager
def memory_cgroup() -> Iterator[Path]:
    """A fresh memory cgroup; skips the test, with the reason, where none can be made."""
    v1 = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if v1 else _V2) / f"layerstream-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        if not (group / ("memory.limit_in_bytes" if v1 else "memory.max")).exists():
            group.rmdir()
            pytest.skip("the memory controller is not enabled for new cgroups here")
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def limit(group: Path, nbytes: int) -> None:
    """Let ``group`` hold at most ``nbytes``, without swap."""
    name = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").exists() else "memory.max"
    (group / name).write_text(str(nbytes))
    swap = group / "memory.swap.max"
    if swap.exists():
        swap.write_text("0")


def run_in(
    group: Path, program: str, *arguments: str, limit_bytes: int, seconds: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run a Python ``program`` inside ``group``, held to ``limit_bytes``."""
    limit(group, limit_bytes)
    joining = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
    return subprocess.run(
        [sys.executable, "-c", joining + program, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
