"""A memory cgroup that holds processes below a limit and counts what they take, version 1 or 2."""

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

# A process that was killed leaves its cgroup within some milliseconds; one with much memory takes longer.
_EMPTY_SECONDS = 30.0
_LOOK_SECONDS = 0.02


class CgroupError(LayerstreamError):
    """Raised when this machine lets us make no memory cgroup; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCgroup:
    """A memory cgroup of our own."""

    folder: Path
    v1: bool

    def limit(self, nbytes: int) -> None:
        """Let its processes hold at most ``nbytes``, page cache that they bring in included, without swap."""
        name = "memory.limit_in_bytes" if self.v1 else "memory.max"
        (self.folder / name).write_text(str(nbytes))
        # Memory and swap together in version 1, swap alone in version 2; not there where there is no swap.
        swap = "memory.memsw.limit_in_bytes" if self.v1 else "memory.swap.max"
        if (self.folder / swap).exists():
            (self.folder / swap).write_text(str(nbytes) if self.v1 else "0")

    def inside(self, command: Sequence[str]) -> list[str]:
        """``command``, to be started inside: charged for its memory from its first page on."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", join, str(self.folder / "cgroup.procs"), *command]

    def processes(self) -> list[int]:
        """The ids of the processes inside."""
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]

    def peak_bytes(self) -> int | None:
        """The most that was held at one time, page cache included; None where the kernel does not say."""
        try:
            name = "memory.max_usage_in_bytes" if self.v1 else "memory.peak"
            return int((self.folder / name).read_text())
        except OSError:
            return None

    def kills(self) -> int:
        """How many processes the kernel killed because the limit was reached."""
        try:
            name = "memory.oom_control" if self.v1 else "memory.events"
            lines = (self.folder / name).read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@contextmanager
def memory_cgroup(limit_bytes: int | None = None) -> Iterator[MemoryCgroup]:
    """A fresh memory cgroup, gone afterwards. Whoever puts a process into it ends that process.

    Args:
        limit_bytes: What its processes may hold together; None: they are only counted.

    Raises:
        CgroupError: This machine lets us make none.
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
    """Remove the cgroup once its last process is gone."""
    until = time.monotonic() + _EMPTY_SECONDS
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(_LOOK_SECONDS)
        else:
            return
