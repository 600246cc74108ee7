"""The transfer stage: host image -> device slot."""

import asyncio
import time
from collections.abc import Sequence

import torch

from layerstream.stages.arena import RingArena
from layerstream.stages.batch import LayerBatch
from layerstream.stages.channel import Channel
from layerstream.stages.devices.protocol import Copy, Device, Event
from layerstream.stages.errors import annotated
from layerstream.stages.memory import Image
from layerstream.stages.residents import Residents
from layerstream.stages.route import HeldSlot, InFlight, Route
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import Activity
from layerstream.stages.threads import Threads, wait_all

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

    A copy counts as work for as long as the device says that it took. Until it begins, it waits for room: for
    the computation that still reads its slot.

    Args:
        route: Told of batches that were dropped.
        source: Batches whose bytes have arrived.
        device: Where to.
        arena: The ring of device slots.
        residents: Batches that are copied once.
        threads: Two, one per loop.
        out: Gets the batches to compute with.
        clock: This stage's timings.
    """
    # Copies whose end nobody has seen yet. Two keep the copy stream busy; more would only hold host slots.
    copying: Channel[tuple[InFlight, HeldSlot | None, float, Event]] = Channel(2)
    sources: set[HeldSlot] = set()  # host slots that are being copied from
    copies = _Copies(clock)

    async def start() -> None:
        while True:
            waiting = time.perf_counter()
            item = await source.get()
            waiting = copies.waited(Activity.WAITING_IN, waiting, item.batch.index)
            if item.wanted and item.needs_copy:
                with annotated("transfer", item.batch):
                    destination, after = await _room(item, arena=arena, residents=residents)
                    asked = copies.waited(Activity.WAITING_OUT, waiting, item.batch.index)
                    copies.under_way += 1
                    begun = await _begin(
                        item, destination, device=device, threads=threads, after=after
                    )
                # Only computation may still need the host image from here on; if it does not, the slot goes
                # home when the copy is done, whatever becomes of the batch until then.
                slot = None if item.batch.uses_host_image else item.detach_host_slot()
                if slot is not None:
                    sources.add(slot)
                await copying.put((item, slot, asked, begun))
            elif item.resident:
                item.device = residents.device_image(item.batch)
            if not item.wanted:
                route.drop(item)
                continue
            waiting = time.perf_counter()
            await out.put(item)
            copies.waited(Activity.WAITING_OUT, waiting, item.batch.index)

    async def finish() -> None:
        while True:
            item, slot, asked, begun = await copying.get()
            with annotated("transfer", item.batch):
                assert item.copied is not None  # noqa: S101
                times = await threads.run(_times_when_done, device, begun, item.copied)
            copies.end(asked, *times, item.batch)
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
        await wait_all([threads.submit(_drain, device)])
        for slot in sources:
            slot.give_back()


class _Copies:
    """The time of a stage whose two loops work and wait at once: while copies are under way, it works."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._finished = 0.0  # when the last copy was
        self.under_way = 0  # begun, and not seen to their end

    def waited(self, activity: Activity, since: float, batch: int) -> float:
        """Count what of the time since ``since`` was spent on nothing but waiting; returns the present."""
        now = time.perf_counter()
        if not self.under_way:
            self._clock.add(activity, max(since, self._finished), now, batch=batch)
        return now

    def end(self, asked: float, begun: float, ended: float, batch: LayerBatch) -> None:
        """Count a copy that was asked for at ``asked``, and queued behind those before it."""
        asked, index = max(asked, self._finished), batch.index
        begun = self._clock.add(Activity.WAITING_OUT, asked, max(asked, begun), batch=index)
        self._finished = self._clock.add(
            Activity.WORKING, begun, max(begun, ended), batch=index, nbytes=batch.copied_bytes
        )
        self.under_way -= 1


def _times_when_done(device: Device, begun: Event, copied: Event) -> tuple[float, float]:
    """When a copy began and ended on the device, once it has."""
    copied.synchronize()
    now = time.perf_counter()  # for a device that has failed since
    times = device.passed_at(begun), device.passed_at(copied)
    return (now if times[0] is None else times[0], now if times[1] is None else times[1])


def _drain(device: Device) -> None:
    device.copy((), after=()).synchronize()  # copies pass in order: when this one has, all have


async def _room(
    item: InFlight, *, arena: RingArena, residents: Residents
) -> tuple[torch.Tensor, tuple[Event, ...]]:
    """The bytes on the device for ``item``, and what must have passed before they are written."""
    batch = item.batch
    if batch.device_resident:
        return residents.device_bytes(batch), ()
    slot = await arena.take(batch.device_bytes, batch=batch.index)
    item.device_slot = HeldSlot(arena, slot)
    return slot.tensor, slot.after


async def _begin(
    item: InFlight,
    destination: torch.Tensor,
    *,
    device: Device,
    threads: Threads,
    after: tuple[Event, ...],
) -> Event:
    """Put the copies of ``item`` to ``destination`` in the device's queue; returns their beginning."""
    item.device = Image([(0, destination)])
    assert item.host is not None  # noqa: S101
    copies = [
        (
            destination.narrow(0, segment.device_offset, segment.nbytes),
            item.host.bytes(segment.host_offset, segment.nbytes),
        )
        for segment in item.batch.segments
    ]
    begun, item.copied = await threads.run(_enqueue, device, copies, after)
    return begun


def _enqueue(device: Device, copies: Sequence[Copy], after: Sequence[Event]) -> tuple[Event, Event]:
    # Copies pass in order: one of nothing passes when those before it have, and ``after`` too.
    return device.copy((), after=after), device.copy(copies, after=())
