"""Who may ride: requests reserve their memory before they board, first come, first served."""

from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from layerstream.pipeline.room import refusal
from layerstream.stages.errors import ClosedError

__all__ = ["Admission", "Reservation"]


class Reservation(Future[None]):
    """Memory that a request asks for, and a place if it needs one. Done when it has them.

    Wait for it in a thread by ``result()``, on the event loop by ``asyncio.wrap_future``.
    """

    def __init__(self, nbytes: int, *, places: int) -> None:
        super().__init__()
        self.nbytes = nbytes
        self.places = places


class Admission:
    """Hands out the memory for requests, and the places of the riders' threads. For the event loop only.

    A request has all of its memory from its beginning to its end, so that none fails half-way. They get it in
    the order in which they asked: a small one that would fit does not overtake a large one that waits.

    Args:
        room_bytes: memory for KV caches and activations of all requests together.
        places: how many requests may ride at once.
    """

    def __init__(self, *, room_bytes: int, places: int) -> None:
        self.room_bytes = room_bytes
        self.reserved_bytes = 0
        self._places = places
        self._queue: deque[Reservation] = deque()
        self._granted: set[Reservation] = set()
        self._closed: str | None = None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    def ask(self, reservation: Reservation) -> None:
        """Grant ``reservation`` when its turn comes; at once if there is room and nobody waits."""
        if self._closed is not None:
            reservation.set_exception(ClosedError(self._closed))
            return
        self._queue.append(reservation)
        self._grant()

    def give_back(self, reservation: Reservation) -> None:
        """Take back what ``reservation`` has, or its place in the queue. May be called again."""
        if reservation in self._granted:
            self._granted.remove(reservation)
            self.reserved_bytes -= reservation.nbytes
            self._places += reservation.places
        elif reservation in self._queue:
            self._queue.remove(reservation)
            reservation.cancel()
        self._grant()

    def resize(self, room_bytes: int) -> None:
        """From now on there is so much. Who has some keeps it; who waits for more than there is, is refused."""
        self.room_bytes = room_bytes
        for waiting in [each for each in self._queue if each.nbytes > room_bytes]:
            self._queue.remove(waiting)  # or else all behind it would wait for ever
            error = refusal(
                what="a request that waits", need_bytes=waiting.nbytes, room_bytes=room_bytes
            )
            with suppress(InvalidStateError):  # cancelled by who waits
                waiting.set_exception(error)
        self._grant()

    def close(self, why: str) -> None:
        """Let those who wait, and all who ask from now on, fail with a ClosedError that says ``why``."""
        self._closed = why
        while self._queue:
            with suppress(InvalidStateError):  # cancelled by who waits
                self._queue.popleft().set_exception(ClosedError(why))

    def _grant(self) -> None:
        while self._queue:
            first = self._queue[0]
            if first.nbytes > self.room_bytes - self.reserved_bytes or first.places > self._places:
                return
            self._queue.popleft()
            if not first.set_running_or_notify_cancel():
                continue
            self._granted.add(first)
            self.reserved_bytes += first.nbytes
            self._places -= first.places
            first.set_result(None)
