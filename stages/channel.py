"""The bounded queue between two stages, which an error can close."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

from layerstream.stages.errors import copy_of

__all__ = ["Channel"]

T = TypeVar("T")


class Channel(Generic[T]):
    """A bounded queue for one sender and one receiver on one event loop.

    Unlike ``asyncio.Queue`` it can be closed with an error, which the receiver gets at once, ahead of what
    is still queued: a failed stage is reported promptly, not after the batches that preceded it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._error is not None

    async def put(self, item: T) -> None:
        """Queue ``item`` once there is space."""
        while len(self._items) >= self._size and self._error is None:
            await self._wait()
        if self._error is not None:
            raise copy_of(self._error)
        self._items.append(item)
        self._changed.set()

    async def peek(self) -> T:
        """Return the oldest item, once there is one, without removing it.

        Raises:
            BaseException: The error that closed the channel.
        """
        while not self._items and self._error is None:
            await self._wait()
        if self._error is not None:
            error, self._error = self._error, copy_of(self._error)
            try:
                raise error
            finally:
                del error  # it refers to this frame, which would refer to it
        return self._items[0]

    async def get(self) -> T:
        """Remove and return the oldest item, once there is one; raises as ``peek`` does."""
        item = await self.peek()
        self._items.popleft()
        self._changed.set()
        return item

    def close(self, error: BaseException) -> None:
        """Make every ``get``, ``peek`` and ``put`` raise from now on: ``error`` itself to the first receiver, else a copy.

        Closing again changes nothing.
        """
        if self._error is None:
            self._error = error
        self._changed.set()

    async def _wait(self) -> None:
        # Sender and receiver never wait at once: one waits for space, the other for items.
        self._changed.clear()
        await self._changed.wait()
