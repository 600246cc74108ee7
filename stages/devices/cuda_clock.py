"""When the events of a CUDA device passed, by the host's clock."""

import logging
import math
import time

import torch

__all__ = ["CudaClock"]

logger = logging.getLogger(__name__)

# How old an anchor may be. CUDA reports milliseconds as a 32-bit float, which after ten seconds resolves a
# microsecond; and the two clocks drift by some parts in 100,000.
_ANCHOR_SECONDS = 10.0
# How long anchors are polled, all attempts together: this happens on the event loop, and an anchor waits for nothing
# but another process's time slice.
_POLLING_SECONDS = 0.001
# How far apart the host's times around an anchor may lie: it takes some ten microseconds to pass and be seen, but
# the polling thread may be descheduled meanwhile.
_UNCERTAIN_SECONDS = 0.0001
# From a failed attempt to the next.
_RETRY_SECONDS = 0.1


class CudaClock:
    """Converts the times of a device's events to the host's clock.

    CUDA measures the time between two events. So one is needed whose time the host knows: an anchor, on a stream
    where nothing is before it, which the host has seen pass between two of its times. It is renewed now and then,
    and may be later than an event: the time between them is then negative.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self._stream = torch.cuda.Stream(torch_device, priority=-1)  # type: ignore[no-untyped-call]
        self._anchor: tuple[torch.cuda.Event, float] | None = None
        self._renewed_seconds = -math.inf

    def passed_at(self, event: torch.cuda.Event) -> float | None:
        """When ``event`` passed, by ``time.perf_counter``; None if that is unknown yet, or for good."""
        try:
            if not event.query():  # type: ignore[no-untyped-call]
                return None
            if time.perf_counter() - self._renewed_seconds > _ANCHOR_SECONDS:
                self._renew()
            if self._anchor is None:
                return None
            anchor, seconds = self._anchor
            passed: float = seconds + anchor.elapsed_time(event) / 1e3
        except RuntimeError as error:
            # A kernel has faulted: nothing passes on this device any more.
            logger.debug("%s reports no times: %s", self._stream.device, error)
            return None
        return min(passed, time.perf_counter())

    def _renew(self) -> None:
        """Take a new anchor if one is seen to pass in time; the first one may be uncertain."""
        now = time.perf_counter()
        self._renewed_seconds = now + _RETRY_SECONDS - _ANCHOR_SECONDS  # unless it succeeds
        while (seen := self._new_anchor(now + _POLLING_SECONDS)) is not None:
            anchor, seconds, uncertain_seconds = seen
            certain = uncertain_seconds <= _UNCERTAIN_SECONDS
            if certain or self._anchor is None:
                self._anchor = anchor, seconds
            if certain:
                self._renewed_seconds = now
                return

    def _new_anchor(self, until_seconds: float) -> tuple[torch.cuda.Event, float, float] | None:
        """An event, the time when it was seen to have passed, and how long before that it may have passed.

        None if it had not passed by ``until_seconds``: torch hands out its streams several times.
        """
        anchor = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # It passed after the last query that found it not passed had begun.
        before = polled = time.perf_counter()
        anchor.record(self._stream)
        while polled < until_seconds:
            if anchor.query():  # type: ignore[no-untyped-call]
                seen = time.perf_counter()
                return anchor, seen, seen - before
            before, polled = polled, time.perf_counter()
        return None
