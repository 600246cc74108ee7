"""The transfer stage: host image -> device slot."""

import asyncio
import time

from layerstream.stages.arena import RingArena
from layerstream.stages.channel import Channel
from layerstream.stages.devices import Device, Event
from layerstream.stages.errors import noting
from layerstream.stages.memory import Image
from layerstream.stages.residents import Residents
from layerstream.stages.route import HeldSlot, InFlight, Route
from layerstream.stages.threads import Threads, settled
from layerstream.stages.timings import Clock, Doing

__all__ = ["transfer_stage"]


async def transfer_stage(  # noqa: C901 - two short loops, which read best side by side
    *,
    route: Route,
    source: Channel[InFlight],
    device: Device,
    arena: RingArena,
    residents: Residents,
    threads: Threads,
    out: Channel[InFlight],
    clock: Clock,
) -> None:
    """Copy what each batch has segments for, for ever; a batch without any is passed on.

    Computation gets a batch as soon as its copies are on the device's copy stream: it waits there for their
    event, not here. A second loop waits for the event on the host, to give the host slot back.

    Args:
        route: told of batches that were dropped.
        source: batches whose bytes have arrived.
        device: where to.
        arena: the ring of device slots.
        residents: batches that are copied once.
        threads: two, one per loop.
        out: gets the batches to compute with.
        clock: this stage's timings.
    """
    # Copies whose end nobody has seen yet. Two keep the copy stream busy; more would only hold host slots.
    copying: Channel[tuple[InFlight, HeldSlot | None, float]] = Channel(2)
    sources: set[HeldSlot] = set()  # host slots that are being copied from

    async def start() -> None:
        while True:
            waiting = time.perf_counter()
            item = await source.get()
            begun = clock.add(Doing.WAITING_IN, waiting)
            if item.wanted and item.needs_copy:
                with noting("transfer", item.batch):
                    await _begin(
                        item, device=device, arena=arena, residents=residents, threads=threads
                    )
                # Only computation may still need the host image from here on; if it does not, the slot goes
                # home when the copy is done, whatever becomes of the batch until then.
                slot = None if item.batch.uses_host_image else item.detach_host_slot()
                if slot is not None:
                    sources.add(slot)
                waiting = time.perf_counter()
                clock.add(Doing.WAITING_OUT, begun, waiting, batch=item.batch.index)
                await copying.put((item, slot, waiting))
            elif item.resident:
                item.device = residents.device_image(item.batch)
            if not item.wanted:
                route.drop(item)
                continue
            waiting = time.perf_counter()
            await out.put(item)
            clock.add(Doing.WAITING_OUT, waiting, batch=item.batch.index)

    async def finish() -> None:
        finished = 0.0
        while True:
            item, slot, begun = await copying.get()
            with noting("transfer", item.batch):
                assert item.copied is not None  # noqa: S101
                await threads.run(item.copied.synchronize)
            finished = clock.add(
                Doing.WORKING,
                max(begun, finished),
                batch=item.batch.index,
                nbytes=item.batch.copied_bytes,
            )
            if slot is not None:
                sources.remove(slot)
                slot.give_back()
            if item.batch.device_resident:
                residents.arrived(item.batch)

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(start(), name="layerstream-transfer-start")
            tasks.create_task(finish(), name="layerstream-transfer-finish")
    finally:
        # The memory of both sides goes back after this: no copy may be under way, seen to its end or not.
        await settled([threads.submit(_drain, device)])
        for slot in sources:
            slot.give_back()


def _drain(device: Device) -> None:
    device.copy((), after=()).synchronize()  # copies pass in order: when this one has, all have


async def _begin(
    item: InFlight,
    *,
    device: Device,
    arena: RingArena,
    residents: Residents,
    threads: Threads,
) -> None:
    """Find room for ``item`` on the device and start its copies."""
    batch = item.batch
    after: tuple[Event, ...] = ()
    if batch.device_resident:
        destination = residents.device_bytes(batch)
    else:
        slot = await arena.take(batch.device_bytes)
        item.device_slot = HeldSlot(arena, slot)
        destination, after = slot.tensor, slot.after
    item.device = Image([(0, destination)])
    assert item.host is not None  # noqa: S101
    copies = [
        (
            destination.narrow(0, segment.device_offset, segment.nbytes),
            item.host.bytes(segment.host_offset, segment.nbytes),
        )
        for segment in batch.segments
    ]
    item.copied = await threads.run(device.copy, copies, after=after)
