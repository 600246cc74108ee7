"""Checks the content of a model's weight files against recorded digests while the model runs, beside it.

What is read is what the layer batches are read of, by a reader of the same kind (past the page cache, or the mapped pages), in the
order in which the first sweep needs it; residents, experts and rows that passes read on demand are in it, for whole files are checked.
No pass waits for it. Its thread yields the processor to all others.
"""

import asyncio
import hashlib
import logging
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.digests import FileDigests, FilePiece
from layerstream.pipeline.checkpoint.source_reader import SourceReader
from layerstream.pipeline.planning.plan import Plan, ReaderKind
from layerstream.pipeline.streaming.resources import open_reader
from layerstream.stages.batch import Extent
from layerstream.stages.errors import CheckpointError, ClosedError, copy_of
from layerstream.stages.memory import HostMemory, round_up
from layerstream.stages.readers.direct import BLOCK_BYTES
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.throttled import Throttle
from layerstream.stages.text import format_bytes
from layerstream.stages.threads import Threads, wait_all

__all__ = ["ContentCheck"]

logger = logging.getLogger(__name__)

# Of one read: as fast as larger ones for one thread, which hashes no faster; it is in no budget.
_CHUNK_BYTES = 1 << 20
_LOWEST_PRIORITY = 19

_Read = Callable[[Extent, memoryview], None]


class _CorruptError(CheckpointError):
    """Content is not as recorded, and stays so."""


class ContentCheck:
    """A check that runs from ``start`` on, once. Close it.

    Args:
        checkpoint: The files.
        digests: Of all of them, by name.
        plan: How they are read, and in which order.
        guard: Watches over the reads.
        throttle: What its reads wait for with those of the layer batches, if these are throttled.
        on_failure: Called on the event loop if something is wrong with the content.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        digests: Mapping[str, FileDigests],
        plan: Plan,
        *,
        guard: ReadGuard,
        throttle: Throttle | None,
        on_failure: Callable[[BaseException], Awaitable[None]],
    ) -> None:
        self._checkpoint = checkpoint
        self._digests = digests
        self._plan = plan
        self._throttle = throttle
        self._guard = guard.part()
        self._on_failure = on_failure
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin; what it needs is taken now.

        Raises:
            DeviceError: The system starts no thread.
        """
        self._threads = Threads("verify", 1)
        self._guard.give_up_when_stopped(self._threads)
        self._task = asyncio.create_task(self._run(), name="layerstream-verify")

    @property
    def _is_passing(self) -> bool:
        """Whether it ended by an error of reading: passes find that for themselves."""
        return not isinstance(self._error, _CorruptError)

    def start_again(self) -> None:
        """If it ended by an error of reading, begin anew.

        Raises:
            CheckpointError: It has found that files are corrupt, which they stay.
        """
        if self._error is not None and not self._is_passing:
            raise copy_of(self._error)
        if self._error is not None:
            self._error = None
            self._task = asyncio.create_task(self._run(), name="layerstream-verify")

    async def finished(self) -> None:
        """Wait until everything has been checked.

        Raises:
            CheckpointError: Something is wrong: file, tensor, offset; a ReadError if a file cannot be read.
            ClosedError: It was closed before its end.
        """
        assert self._task is not None  # noqa: S101 - it is started when the model is opened
        while (task := self._task) is not None:
            await asyncio.wait([task])
            if task is self._task:  # not begun anew meanwhile
                break
        if self._error is not None:
            raise copy_of(self._error)
        if self._task.cancelled():
            raise ClosedError("the model was closed before all of its files were verified")

    async def _run(self) -> None:
        future = self._threads.submit(self._read_all)
        await wait_all([future])
        error = ClosedError() if future.cancelled() else future.exception()
        del future  # its exception would refer to this frame
        if self._guard.stopped.done() and error is not None:  # a consequence of that
            raise asyncio.CancelledError
        if error is not None:
            self._error = copy_of(error)
            # Not the error itself, whose frames refer to memory.
            logger.error("%s: the files are not verified: %s", self._checkpoint.path, str(error))
            if not self._is_passing:
                await self._on_failure(copy_of(self._error))

    def _read_all(self) -> None:
        """Check all pieces, in a thread.

        Raises:
            CheckpointError: A piece is not as recorded, or cannot be read.
            ClosedError: It was stopped before the end.
        """
        with suppress(
            OSError
        ):  # of this thread alone; the pages that it waits for count as its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        began, nbytes = time.monotonic(), 0
        with ExitStack() as opened:
            read = self._opened_reader(opened)
            memory = HostMemory(_CHUNK_BYTES)
            opened.callback(memory.close)
            buffer = opened.enter_context(memoryview(memory.tensor.numpy().data))
            for file, piece in _in_order(self._checkpoint, self._digests, self._plan):
                found = self._hash(read, file, piece, buffer)
                if found != piece.sha256:
                    raise _CorruptError(piece.corrupt(self._checkpoint.files[file].path, found))
                nbytes += piece.nbytes
        logger.info(
            "%s: the content of all %d files equals the recorded digests (%s in %.1f s)",
            self._checkpoint.path,
            len(self._checkpoint.files),
            format_bytes(nbytes),
            time.monotonic() - began,
        )

    def _opened_reader(self, opened: ExitStack) -> _Read:
        if self._plan.reader is ReaderKind.MMAP:
            # The same pages, by calls that return errors: where a mapped page cannot be read, the process is killed.
            source = SourceReader(self._checkpoint, guard=self._guard)
            opened.callback(source.close)
            return source.read_extent
        reader = open_reader(self._plan, self._guard, self._throttle)
        opened.callback(reader.close)
        return reader.read

    def _hash(self, read: _Read, file: int, piece: FilePiece, buffer: memoryview) -> str:
        """The digest of what the file holds."""
        digest = hashlib.sha256()
        size = self._checkpoint.files[file].size_bytes
        at, stop = piece.offset, piece.offset + piece.nbytes
        while at < stop:
            if self._guard.stopped.done():
                raise ClosedError("the model was closed before all of its files were verified")
            start = at // BLOCK_BYTES * BLOCK_BYTES
            nbytes = min(round_up(stop, BLOCK_BYTES), size, start + _CHUNK_BYTES) - start
            extent = Extent(file=file, offset=start, nbytes=nbytes)
            into = buffer[: round_up(nbytes, BLOCK_BYTES)]
            self._guard.patiently(partial(read, extent, into))
            end = min(stop, start + nbytes)
            digest.update(buffer[at - start : end - start])
            at = end
        return digest.hexdigest()

    async def aclose(self) -> None:
        """End it soon, and wait for that. May be called again."""
        self._guard.stop()
        if self._task is not None:
            await asyncio.wait([self._task])
            self._threads.close()
        self._guard.close()


def _in_order(
    checkpoint: Checkpoint, digests: Mapping[str, FileDigests], plan: Plan
) -> Sequence[tuple[int, FilePiece]]:
    """All pieces with the numbers of their files: those of each layer batch in turn, then the others."""
    reads: list[list[tuple[int, int, int]]] = [
        [] for _ in checkpoint.files
    ]  # by file: stop, start, batch
    for batch in plan.batches:
        for read in batch.reads:
            stop = read.file_offset + read.nbytes
            reads[read.file].append((stop, read.file_offset, batch.index))
    for each in reads:
        each.sort()

    def first_batch(file: int, piece: FilePiece) -> int:
        first = len(plan.batches)
        for at in range(bisect_left(reads[file], (piece.offset + 1, 0, 0)), len(reads[file])):
            _, start, batch = reads[file][at]
            if start >= piece.offset + piece.nbytes:
                break
            first = min(first, batch)
        return first

    pieces = [
        (number, piece)
        for number, file in enumerate(checkpoint.files)
        for piece in digests[file.name].pieces
    ]
    return sorted(pieces, key=lambda each: first_batch(*each))
