"""The read stage: disk -> host slot."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import ParamSpec

from layerstream.stages.arena import RingArena
from layerstream.stages.batch import LayerBatch, Residence
from layerstream.stages.channel import Channel
from layerstream.stages.errors import annotated
from layerstream.stages.memory import Image, round_up
from layerstream.stages.readers.coalescing import requests_of
from layerstream.stages.readers.direct import BLOCK_BYTES
from layerstream.stages.readers.mapped import MmapReader
from layerstream.stages.readers.protocol import Reader
from layerstream.stages.residents import Residents
from layerstream.stages.route import HeldSlot, InFlight, Route
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import Activity
from layerstream.stages.threads import Threads, wait_all

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
    """Read layer batches in the order of ``route``, until cancelled.

    One loop starts reads and another waits for them, so that the disk has the next batch's requests queued
    while the last ones of this batch are in progress.

    Args:
        route: Decides which batch is next.
        reader: Fills slots from the files.
        mapped: The same reader, if computation uses its mapping of the files instead of slots.
        arena: The ring of host slots.
        residents: Batches that are read once.
        threads: One for each request in flight.
        request_bytes: Size of one request.
        out: Takes the batches whose bytes have arrived.
        clock: This stage's timings.
    """
    # One batch may wait between the loops; more would only take slots before they can be read into.
    started: Channel[InFlight] = Channel(1)

    async def start() -> None:
        while True:
            item = route.next()
            with annotated("read", item.batch):
                await _start_reads(item, reader, mapped, arena, residents, threads, request_bytes)
            await started.put(item)

    async def finish() -> None:
        idle_since = time.perf_counter()
        while True:
            item = await started.get()
            await wait_all(item.reads, on_cancel=Future.cancel)
            if not item.wanted:
                route.drop(item)
                continue
            with annotated("read", item.batch):
                times = [read.result() for read in item.reads]
                if mapped is not None:
                    item.host = mapped.image(item.batch)
            idle_since = _count_work(clock, item.batch, times, idle_since=idle_since)
            if item.batch.residence is Residence.HOST:
                residents.arrived(item.batch)
            await out.put(item)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(start(), name="layerstream-read-start")
        tasks.create_task(finish(), name="layerstream-read-finish")


async def _start_reads(  # noqa: PLR0917 - those of the stage, by the same names
    item: InFlight,
    reader: Reader,
    mapped: MmapReader | None,
    arena: RingArena,
    residents: Residents,
    threads: Threads,
    request_bytes: int,
) -> None:
    """Take a slot for ``item`` and queue its requests on the reading threads, unless it needs neither."""
    batch = item.batch
    item.resident = await residents.loaded(batch)
    if item.resident:
        item.host = residents.host_image(batch)
        return
    if mapped is not None:
        item.reads = [
            threads.submit(_timed, mapped.fault_in, extent)
            for extent, _ in requests_of(batch.reads, request_bytes)
            if not mapped.faulted_in_recently(extent)
        ]
        return
    image = residents.host_image(batch)
    if image is None:
        slot = await arena.take(batch.host_bytes, batch=batch.index)
        item.host_slot = HeldSlot(arena, slot)
        image = Image([(0, slot.tensor)])
    if not item.wanted:  # dropped while it waited for a slot
        return
    item.host = image
    buffer = memoryview(image.memory.numpy().data)  # the same bytes, as a buffer for preadv
    for extent, start in requests_of(batch.reads, request_bytes):
        stop = start + round_up(extent.nbytes, BLOCK_BYTES)
        item.reads.append(threads.submit(_timed, reader.read, extent, buffer[start:stop]))


def _count_work(
    clock: Clock, batch: LayerBatch, times: Sequence[tuple[float, float]], *, idle_since: float
) -> float:
    """Count the reading of ``batch`` from the times of its requests; returns since when the stage is idle."""
    if not times:
        return idle_since
    # Requests of two batches overlap: each batch counts from the end of the one before it.
    begin = max(idle_since, min(start for start, _ in times))
    # Small requests may have ended before the last ones of the batch before.
    end = max(begin, *(stop for _, stop in times))
    clock.add(Activity.WAITING_OUT, idle_since, begin, batch=batch.index)
    return clock.add(Activity.WORKING, begin, end, batch=batch.index, nbytes=batch.read_bytes)


def _timed(call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> tuple[float, float]:
    begin = time.perf_counter()
    call(*args, **kwargs)
    return begin, time.perf_counter()
