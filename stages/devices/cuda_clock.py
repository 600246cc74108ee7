"""When the events of a CUDA device passed, by the host's clock."""

import logging
import math
import time

import torch

__all__ = ["CudaClock"]

logger = logging.getLogger(__name__)

# How old an anchor may be. CUDA tells milliseconds as a 32-bit float, which after ten seconds resolves a
# microsecond; and the two clocks drift by some parts in 100,000.
_ANCHOR_SECONDS = 10.0
# How long anchors are looked at to pass, all tries together: the event loop does so, and they have nothing to wait
# for but another process's turn.
_ANCHORING_SECONDS = 0.001
# How far apart the host's times around an anchor may lie: it takes some ten microseconds to pass and be seen, but
# the looking thread may lose the processor meanwhile.
_APART_SECONDS = 0.0001
# From one attempt that failed to the next.
_AGAIN_SECONDS = 0.1


class CudaClock:
    """Tells when events of a device passed, by the host's clock.

    CUDA tells the time between two events. So one is needed whose time the host knows: an anchor, on a stream
    where nothing is before it, which the host has seen pass between two of its times. Renewed now and then, it may
    well be younger than an event, whose time is then less than none.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self._stream = torch.cuda.Stream(torch_device, priority=-1)  # type: ignore[no-untyped-call]
        self._anchor: tuple[torch.cuda.Event, float] | None = None
        self._renewed_at = -math.inf

    def passed_at(self, event: torch.cuda.Event) -> float | None:
        """When ``event`` passed, by ``time.perf_counter``; None where that cannot be told now, or ever."""
        try:
            if not event.query():  # type: ignore[no-untyped-call]
                return None
            if time.perf_counter() - self._renewed_at > _ANCHOR_SECONDS:
                self._renew()
            if self._anchor is None:
                return None
            anchor, seconds = self._anchor
            passed: float = seconds + anchor.elapsed_time(event) / 1e3
        except RuntimeError as error:
            # A kernel has faulted: nothing passes on this device any more.
            logger.debug("%s tells no times: %s", self._stream.device, error)
            return None
        return min(passed, time.perf_counter())

    def _renew(self) -> None:
        """Take a new anchor if one is seen to pass in time; where there is none yet, one that is less sure will do."""
        now = time.perf_counter()
        self._renewed_at = now + _AGAIN_SECONDS - _ANCHOR_SECONDS  # unless it comes to more
        while (seen := self._new_anchor(now + _ANCHORING_SECONDS)) is not None:
            anchor, seconds, apart = seen
            sure = apart <= _APART_SECONDS
            if sure or self._anchor is None:
                self._anchor = anchor, seconds
            if sure:
                self._renewed_at = now
                return

    def _new_anchor(self, until: float) -> tuple[torch.cuda.Event, float, float] | None:
        """An event, the time when it was seen to have passed, and how long before that it may have been.

        None: it had not passed by ``until``, since torch has others use the stream too.
        """
        anchor = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # It passed later than the last look that did not see it pass began.
        before = looking = time.perf_counter()
        anchor.record(self._stream)
        while looking < until:
            if anchor.query():  # type: ignore[no-untyped-call]
                seen = time.perf_counter()
                return anchor, seen, seen - before
            before, looking = looking, time.perf_counter()
        return None
