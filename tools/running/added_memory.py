"""How much memory a piece of work adds to this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from layerstream.stages.process.usage import anonymous_bytes

__all__ = ["AddedMemory", "added_memory"]

# Often enough to see a layer batch come and go; each look costs some tens of microseconds.
_INTERVAL_SECONDS = 0.02


@dataclass(slots=True)
class AddedMemory:
    """The anonymous memory that came on top of ``before_bytes``, at its highest so far.

    Memory that is held for less than a look's interval may go unseen.
    """

    before_bytes: int | None
    peak_bytes: int | None = None

    def look(self) -> None:
        """Take the present into account."""
        now_bytes = anonymous_bytes()
        if now_bytes is not None and self.before_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, now_bytes - self.before_bytes)


@asynccontextmanager
async def added_memory() -> AsyncIterator[AddedMemory]:
    """Watch how much memory is added while the block runs."""
    added = AddedMemory(anonymous_bytes())

    async def watch() -> None:
        while True:
            added.look()
            await asyncio.sleep(_INTERVAL_SECONDS)

    task = asyncio.create_task(watch())
    try:
        yield added
    finally:
        task.cancel()
        await asyncio.wait([task])
        added.look()
