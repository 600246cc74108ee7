"""The memory that a block of code adds to this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from layerstream.stages.process.usage import anonymous_bytes

__all__ = ["AddedMemory", "added_memory"]

# Short enough to see a layer batch come and go; each sample costs some tens of microseconds.
_INTERVAL_SECONDS = 0.02


@dataclass(slots=True)
class AddedMemory:
    """The peak of the anonymous memory added to ``before_bytes`` so far.

    Memory that is held for less than the sampling interval may be missed.
    """

    before_bytes: int | None
    peak_bytes: int | None = None

    def sample(self) -> None:
        """Update the peak."""
        now_bytes = anonymous_bytes()
        if now_bytes is not None and self.before_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, now_bytes - self.before_bytes)


@asynccontextmanager
async def added_memory() -> AsyncIterator[AddedMemory]:
    """Track the memory that is added while the block runs."""
    added = AddedMemory(anonymous_bytes())

    async def watch() -> None:
        while True:
            added.sample()
            await asyncio.sleep(_INTERVAL_SECONDS)

    task = asyncio.create_task(watch())
    try:
        yield added
    finally:
        task.cancel()
        await asyncio.wait([task])
        added.sample()
