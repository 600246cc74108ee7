"""Page faults that last: threads that wait for a page of a mapped file."""

import time
from pathlib import Path

__all__ = ["PageFaults"]

_TASKS = Path("/proc/self/task")
# What Linux writes instead of the number of a system call for a thread that waits, but in none.
_IN_NO_CALL = "-1 "
_MINOR_FAULTS, _MAJOR_FAULTS = 7, 9  # of the fields behind a thread's name in "stat"


class PageFaults:
    """How long threads of this process have been waiting for one page, as far as the system tells.

    Computation with mapped files waits for their disk in page faults, anywhere, and in threads of torch's own.
    """

    def __init__(self) -> None:
        self._since: dict[str, tuple[object, float]] = {}

    def longest_seconds(self) -> float:
        """How long the longest one has been seen to last; so this is to be called again and again."""
        now, seen = time.monotonic(), {}
        try:
            tasks = list(_TASKS.iterdir())
        except OSError:  # not on this system, or no descriptor is left
            tasks = []
        for task in tasks:
            fault = _fault(task)
            if fault is not None:
                known = self._since.get(task.name)
                seen[task.name] = known if known and known[0] == fault else (fault, now)
        self._since = seen
        return max((now - since for _, since in seen.values()), default=0.0)


def _fault(task: Path) -> object | None:
    """What tells the page fault of a thread from its next one; None if it is in none."""
    try:
        place = (task / "syscall").read_text("ascii")
        if not place.startswith(_IN_NO_CALL):
            return None
        fields = (task / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:  # the thread has ended, or this system does not tell
        return None
    # One instruction may wait for page after page of a slow disk: then these count them.
    return place, fields[_MINOR_FAULTS], fields[_MAJOR_FAULTS]
