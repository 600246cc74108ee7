"""A memory cgroup, version 1 or 2: limits the memory of processes, and reports their peak."""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from layerstream.stages.errors import LayerstreamError

__all__ = ["CgroupError", "MemoryCgroup", "memory_cgroup"]

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")

# A killed process leaves its cgroup within some milliseconds; one with much memory takes longer.
_EMPTY_SECONDS = 30.0
_POLL_SECONDS = 0.02


class CgroupError(LayerstreamError):
    """Raised when no memory cgroup can be made on this machine; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCgroup:
    """A memory cgroup made by ``memory_cgroup``."""

    folder: Path
    v1: bool

    def limit(self, nbytes: int) -> None:
        """Limit its processes to ``nbytes``, including the page cache that they fill, without swap."""
        name = "memory.limit_in_bytes" if self.v1 else "memory.max"
        (self.folder / name).write_text(str(nbytes))
        # Memory and swap together in version 1, swap alone in version 2; the file is missing without swap.
        swap = "memory.memsw.limit_in_bytes" if self.v1 else "memory.swap.max"
        if (self.folder / swap).exists():
            (self.folder / swap).write_text(str(nbytes) if self.v1 else "0")

    def inside(self, command: Sequence[str]) -> list[str]:
        """Wrap ``command`` so that it starts inside: its memory is charged from the first page on."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", join, str(self.folder / "cgroup.procs"), *command]

    def join(self) -> None:
        """Move this process inside: what it takes from now on is charged."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def processes(self) -> list[int]:
        """The ids of the processes inside."""
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]

    def peak_bytes(self) -> int | None:
        """Peak memory of its processes, page cache included; None if the kernel does not report it."""
        try:
            name = "memory.max_usage_in_bytes" if self.v1 else "memory.peak"
            return int((self.folder / name).read_text())
        except OSError:
            return None

    def uncached_bytes(self) -> int:
        """Memory of its processes now, without page cache, which the kernel takes back before it kills."""
        name, prefix = ("usage_in_bytes", "total_") if self.v1 else ("current", "")
        text = (self.folder / "memory.stat").read_text()
        stat = dict(line.split() for line in text.splitlines())
        cached = sum(int(stat[f"{prefix}{each}_file"]) for each in ("inactive", "active"))
        return int((self.folder / f"memory.{name}").read_text()) - cached

    def kills(self) -> int:
        """The number of processes that the kernel killed because the limit was reached."""
        try:
            name = "memory.oom_control" if self.v1 else "memory.events"
            lines = (self.folder / name).read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@contextmanager
def memory_cgroup(limit_bytes: int | None = None) -> Iterator[MemoryCgroup]:
    """Make a memory cgroup, and remove it afterwards. The caller ends the processes that it puts inside.

    Where signals raise, it is to be entered with signals held back (``entered_whole``).

    Args:
        limit_bytes: Limit for its processes together; None only measures them.

    Raises:
        CgroupError: None can be made on this machine.
    """
    v1 = (_V1 / "memory.limit_in_bytes").exists()
    folder = (_V1 if v1 else _V2) / f"layerstream-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        raise CgroupError(
            f"no memory cgroup can be made at {folder}: {error.strerror}; run as root"
        ) from error
    try:
        if not (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).exists():
            raise CgroupError(
                f"new cgroups under {folder.parent} have no memory controller; "
                f"enable it in {folder.parent / 'cgroup.subtree_control'}"
            )
        group = MemoryCgroup(folder=folder, v1=v1)
        if limit_bytes is not None:
            try:
                group.limit(limit_bytes)
            except OSError as error:
                raise CgroupError(f"a memory limit of {limit_bytes} bytes: {error}") from error
        yield group
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove the cgroup when its last process has ended."""
    deadline = time.monotonic() + _EMPTY_SECONDS
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)
        else:
            return
