"""Admission: requests reserve their memory before they begin, first come, first served."""

from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from layerstream.pipeline.scheduling.request_memory import RequestMemory
from layerstream.stages.errors import ClosedError

__all__ = ["Admission", "Reservation"]


class Reservation(Future[None]):
    """A Future that is done when a request has its memory, and a worker thread if it needs one.

    Wait for it in a thread with ``result()``, on the event loop with ``asyncio.wrap_future``.

    Args:
        memory: What it needs.
        threads: The worker threads that it needs: 1 or 0.
    """

    def __init__(self, memory: RequestMemory, *, threads: int) -> None:
        super().__init__()
        self.memory = memory
        self.threads = threads


class Admission:
    """Grants memory and worker threads to requests. For the event loop only.

    A request has all of its memory from its beginning to its end, so that none fails half-way. Grants are made in
    the order of the queue: a small request that would fit does not overtake a large one that waits.

    Args:
        memory: That for KV caches and activations of all requests together.
        threads: The number of worker threads.

    Attributes:
        reserved: What requests have been granted.
    """

    def __init__(self, *, memory: RequestMemory, threads: int) -> None:
        self.memory = memory
        self.reserved = RequestMemory()
        self._free_threads = threads
        self._queue: deque[Reservation] = deque()
        self._granted: set[Reservation] = set()
        self._closed: str | None = None

    @property
    def waiting(self) -> int:
        """The number of reservations that wait."""
        return len(self._queue)

    def enqueue(self, reservation: Reservation) -> None:
        """Grant ``reservation`` when its turn comes; at once if there is memory and none waits."""
        if self._closed is not None:
            reservation.set_exception(ClosedError(self._closed))
            return
        if not reservation.memory.fits(self.memory):  # there is less since it was priced
            reservation.set_exception(reservation.memory.refusal("a request", self.memory))
            return
        self._queue.append(reservation)
        self._grant()

    def release(self, reservation: Reservation) -> None:
        """Free what ``reservation`` has, or remove it from the queue. May be called again."""
        if reservation in self._granted:
            self._granted.remove(reservation)
            self.reserved = self.reserved.minus(reservation.memory)
            self._free_threads += reservation.threads
        elif reservation in self._queue:
            self._queue.remove(reservation)
            reservation.cancel()
        self._grant()

    def resize(self, memory: RequestMemory) -> None:
        """Change the memory for all requests. What is granted stays; reservations that can never be granted fail."""
        self.memory = memory
        for waiting in [each for each in self._queue if not each.memory.fits(memory)]:
            self._queue.remove(waiting)  # otherwise all behind it would wait for ever
            error = waiting.memory.refusal("a request that waits", memory)
            with suppress(InvalidStateError):  # the caller cancelled it
                waiting.set_exception(error)
        self._grant()

    def close(self, why: str) -> None:
        """Fail waiting and future reservations with a ClosedError that says ``why``."""
        self._closed = why
        while self._queue:
            with suppress(InvalidStateError):  # the caller cancelled it
                self._queue.popleft().set_exception(ClosedError(why))

    def _grant(self) -> None:
        while self._queue:
            first = self._queue[0]
            reserved = self.reserved.plus(first.memory)
            if not reserved.fits(self.memory) or first.threads > self._free_threads:
                return
            self._queue.popleft()
            if not first.set_running_or_notify_cancel():
                continue
            self._granted.add(first)
            self.reserved = reserved
            self._free_threads -= first.threads
            first.set_result(None)
