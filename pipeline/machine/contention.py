"""How busy other processes kept this machine during a measurement."""

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Contention"]

# Less is background load that is always there, such as that of kernel threads.
_MIN_PROCESSORS = 0.25
_MIN_SHARE = 0.1
_STAT = Path("/proc/stat")


class Contention:
    """A context manager that measures how many processors other processes keep busy meanwhile, on average.

    Time that a hypervisor gives to other machines counts too.
    """

    def __init__(self, stat: Path = _STAT) -> None:
        self.processors = 0.0
        """Kept busy by other processes; set at the end. 0 if the system does not report it."""
        self._stat = stat

    @property
    def matters(self) -> bool:
        """Whether other processes were busy enough to disturb a measurement on all processors."""
        return self.processors > max(_MIN_PROCESSORS, _MIN_SHARE * (os.cpu_count() or 1))

    def __enter__(self) -> Self:
        self._began = time.perf_counter(), time.process_time(), _busy_seconds(self._stat)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        began, ours, busy = self._began
        now = _busy_seconds(self._stat)
        if busy is not None and now is not None:
            others = (now - busy) - (time.process_time() - ours)
            self.processors = max(0.0, others / max(time.perf_counter() - began, 1e-3))


def _busy_seconds(stat: Path) -> float | None:
    """Return the seconds that all processors together were busy since boot; None if the system does not report them."""
    with suppress(OSError, ValueError):
        name, *ticks = stat.read_text(encoding="ascii", errors="replace").split("\n", 1)[0].split()
        if name == "cpu":
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, ticks[:8])
            return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return None
