"""Admission: requests reserve their memory before they begin, first come, first served."""

from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from layerstream.pipeline.scheduling.request_memory import refusal
from layerstream.stages.errors import ClosedError

__all__ = ["Admission", "Reservation"]


class Reservation(Future[None]):
    """A Future that is done when a request has its memory, and its place if it needs one.

    Wait for it in a thread with ``result()``, on the event loop with ``asyncio.wrap_future``.

    Args:
        nbytes: The memory.
        places: 1 or 0.
    """

    def __init__(self, nbytes: int, *, places: int) -> None:
        super().__init__()
        self.nbytes = nbytes
        self.places = places


class Admission:
    """Grants memory for requests, and places in the threads of passes. For the event loop only.

    A request has all of its memory from its beginning to its end, so that none fails half-way. Grants are made in
    the order of asking: a small request that would fit does not overtake a large one that waits.

    Args:
        memory_bytes: Memory for KV caches and activations of all requests together.
        places: How many threads there are.
    """

    def __init__(self, *, memory_bytes: int, places: int) -> None:
        self.memory_bytes = memory_bytes
        self.reserved_bytes = 0
        self._places = places
        self._queue: deque[Reservation] = deque()
        self._granted: set[Reservation] = set()
        self._closed: str | None = None

    @property
    def waiting(self) -> int:
        """How many reservations wait."""
        return len(self._queue)

    def ask(self, reservation: Reservation) -> None:
        """Grant ``reservation`` when its turn comes; at once if there is memory and nobody waits."""
        if self._closed is not None:
            reservation.set_exception(ClosedError(self._closed))
            return
        self._queue.append(reservation)
        self._grant()

    def give_back(self, reservation: Reservation) -> None:
        """Release what ``reservation`` has, or remove it from the queue. May be called again."""
        if reservation in self._granted:
            self._granted.remove(reservation)
            self.reserved_bytes -= reservation.nbytes
            self._places += reservation.places
        elif reservation in self._queue:
            self._queue.remove(reservation)
            reservation.cancel()
        self._grant()

    def resize(self, memory_bytes: int) -> None:
        """Change the memory for all. What is granted stays; reservations that can never be granted fail."""
        self.memory_bytes = memory_bytes
        for waiting in [each for each in self._queue if each.nbytes > memory_bytes]:
            self._queue.remove(waiting)  # otherwise all behind it would wait for ever
            error = refusal(
                what="a request that waits", need_bytes=waiting.nbytes, memory_bytes=memory_bytes
            )
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
            if (
                first.nbytes > self.memory_bytes - self.reserved_bytes
                or first.places > self._places
            ):
                return
            self._queue.popleft()
            if not first.set_running_or_notify_cancel():
                continue
            self._granted.add(first)
            self.reserved_bytes += first.nbytes
            self._places -= first.places
            first.set_result(None)
