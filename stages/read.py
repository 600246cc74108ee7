"""The read stage: disk -> host slot."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec

from layerstream.stages.arena import RingArena
from layerstream.stages.batch import Extent, LayerBatch
from layerstream.stages.channel import Channel
from layerstream.stages.errors import noting
from layerstream.stages.memory import Image
from layerstream.stages.mmap_reader import MmapReader
from layerstream.stages.readers import BLOCK_BYTES, Reader
from layerstream.stages.residents import Residents
from layerstream.stages.route import HeldSlot, InFlight, Route
from layerstream.stages.threads import Threads, settled
from layerstream.stages.timings import Clock, Doing

__all__ = ["read_stage"]

P = ParamSpec("P")


async def read_stage(
    *,
    route: Route,
    reader: Reader,
    mapped: MmapReader | None,
    arena: RingArena,
    residents: Residents,
    threads: Threads,
    request_bytes: int,
    out: Channel[InFlight],
    clock: Clock,
) -> None:
    """Read layer batches in the order of ``route``, for ever.

    Starting reads and waiting for them are two loops, so that the disk has the next batch's requests in its
    queue while the last ones of this batch are still under way.

    Args:
        route: which batch leaves next.
        reader: fills slots from the files.
        mapped: the same reader, if computation uses its mapping of the files instead of slots.
        arena: the ring of host slots.
        residents: batches that are read once.
        threads: as many requests are in flight as there are threads.
        request_bytes: size of one request.
        out: gets the batches whose bytes have arrived.
        clock: this stage's timings.
    """
    # One batch may wait between the loops; more would only take slots that nothing is read into yet.
    started: Channel[InFlight] = Channel(1)

    async def start() -> None:
        while True:
            item = route.next()
            with noting("read", item.batch):
                await _begin(
                    item,
                    reader=reader,
                    mapped=mapped,
                    arena=arena,
                    residents=residents,
                    threads=threads,
                    request_bytes=request_bytes,
                )
            await started.put(item)

    async def finish() -> None:
        idle_since = time.perf_counter()
        while True:
            item = await started.get()
            await settled(item.reads, droppable=True)
            if not item.wanted:
                route.drop(item)
                continue
            with noting("read", item.batch):
                times = [read.result() for read in item.reads]
                if mapped is not None:
                    item.host = mapped.image(item.batch)
            if times:
                # Requests of two batches overlap: each batch is charged from the end of the one before it.
                begun = max(idle_since, min(begin for begin, _ in times))
                clock.add(Doing.WAITING_OUT, idle_since, begun, batch=item.batch.index)
                idle_since = clock.add(
                    Doing.WORKING,
                    begun,
                    # Small requests may have overtaken the last ones of the batch before.
                    max(begun, *(end for _, end in times)),
                    batch=item.batch.index,
                    nbytes=item.batch.read_bytes,
                )
            if item.batch.host_resident and not item.batch.device_resident:
                residents.arrived(item.batch)
            await out.put(item)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(start(), name="layerstream-read-start")
        tasks.create_task(finish(), name="layerstream-read-finish")


async def _begin(
    item: InFlight,
    *,
    reader: Reader,
    mapped: MmapReader | None,
    arena: RingArena,
    residents: Residents,
    threads: Threads,
    request_bytes: int,
) -> None:
    """Find room for ``item`` and put its requests in the queue of the reading threads."""
    batch = item.batch
    item.resident = await residents.loaded(batch)
    if item.resident:
        item.host = residents.host_image(batch)
        return
    if mapped is not None:
        item.reads = [
            threads.submit(_timed, mapped.touch, extent)
            for extent, _ in _requests(batch, request_bytes)
            if not mapped.touched_lately(extent)
        ]
        return
    if batch.host_resident:
        destination = residents.host_bytes(batch)
    else:
        slot = await arena.take(batch.host_bytes, batch=batch.index)
        item.host_slot = HeldSlot(arena, slot)
        destination = slot.tensor
    if not item.wanted:  # dropped while it waited for room
        return
    item.host = Image([(0, destination)])
    buffer = memoryview(destination.numpy().data)  # the same bytes, as preadv wants them
    for extent, at in _requests(batch, request_bytes):
        padded = -(-extent.nbytes // BLOCK_BYTES) * BLOCK_BYTES
        item.reads.append(threads.submit(_timed, reader.read, extent, buffer[at : at + padded]))


def _requests(batch: LayerBatch, request_bytes: int) -> Iterator[tuple[Extent, int]]:
    """The extents that one call reads each, with their places in the host image."""
    for read in batch.reads:
        for at in range(0, read.nbytes, request_bytes):
            nbytes = min(request_bytes, read.nbytes - at)
            yield (
                Extent(file=read.file, offset=read.file_offset + at, nbytes=nbytes),
                read.host_offset + at,
            )


def _timed(call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> tuple[float, float]:
    begin = time.perf_counter()
    call(*args, **kwargs)
    return begin, time.perf_counter()
