"""Collects what timings are made of: the spans of a stage, and how much of something is in use."""

import threading
import time
from collections import deque
from collections.abc import Callable

from layerstream.stages.telemetry.spans import SPANS_KEPT, Activity, Span, StageTimings

__all__ = ["Clock", "Gauge"]

# Entries of work whose times the device does not know yet. A GPU's queue holds about this many kernels before it
# blocks the host; anything older was given to a device that has failed.
_PENDING_KEPT = 1024
# The device is queried about this many at once, or when the sums are requested: not for each layer batch.
_QUERIED_TOGETHER = 64


class Clock:
    """Collects the spans of one stage. Sums are exact; of the spans themselves the latest are kept.

    A span costs a microsecond or two, and a layer batch has less than ten, so it is always on.

    Attributes:
        last_stop_seconds: When the last span ended; 0 before any.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.spans: deque[Span] = deque(maxlen=SPANS_KEPT)
        self._seconds = dict.fromkeys(Activity, 0.0)
        self._items = 0
        self._bytes = 0
        self._pending: deque[Callable[[Clock], bool]] = deque(maxlen=_PENDING_KEPT)
        self._counting = threading.Lock()  # timings may be requested in any thread
        self.last_stop_seconds = 0.0

    def add(
        self, activity: Activity, start: float, stop: float, *, batch: int, nbytes: int = 0
    ) -> float:
        """Count the time from ``start`` to ``stop``; returns ``stop``."""
        self._seconds[activity] += stop - start
        if activity is Activity.WORKING:
            self._items += 1
            self._bytes += nbytes
        self.spans.append(Span(activity, batch, start, stop, nbytes))
        self.last_stop_seconds = max(self.last_stop_seconds, stop)
        return stop

    def add_later(self, count: Callable[["Clock"], bool]) -> None:
        """Add spans that only the device can time, once it can.

        Args:
            count: Adds them to this clock and returns True, or returns False if the device does not know yet.
                Calls are made in order. If a device has failed, the oldest are forgotten.
        """
        self._pending.append(count)
        if len(self._pending) >= _QUERIED_TOGETHER:
            self._count()

    def _count(self) -> None:
        with self._counting:
            while self._pending and self._pending[0](self):
                self._pending.popleft()

    def sums(self) -> StageTimings:
        """The sums so far, and the spans that are kept."""
        self._count()
        return StageTimings(
            name=self.name,
            items=self._items,
            bytes=self._bytes,
            busy_seconds=self._seconds[Activity.WORKING],
            waited_in_seconds=self._seconds[Activity.WAITING_IN],
            waited_out_seconds=self._seconds[Activity.WAITING_OUT],
            spans=tuple(self.spans),
        )


class Gauge:
    """How much of something is in use: its mean over time, and its peak."""

    def __init__(self) -> None:
        self.peak = 0
        self._amount = 0
        self._area = 0.0
        self._opened = self._changed = time.perf_counter()

    def change(self, by: int) -> float:
        """Count ``by`` more in use, or less; returns the current ``time.perf_counter``."""
        now = time.perf_counter()
        self._area += self._amount * (now - self._changed)
        self._changed = now
        self._amount += by
        self.peak = max(self.peak, self._amount)
        return now

    def mean(self) -> float:
        """The mean over the time since this was made."""
        self.change(0)
        return self._area / max(self._changed - self._opened, 1e-9)
