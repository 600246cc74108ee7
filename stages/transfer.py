"""The transfer stage: host image -> device slot."""

import asyncio
import time
from collections.abc import Sequence

from layerstream.stages.arena import RingArena
from layerstream.stages.batch import LayerBatch
from layerstream.stages.channel import Channel
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.errors import annotated
from layerstream.stages.memory import Image
from layerstream.stages.residents import Residents
from layerstream.stages.route import HeldSlot, InFlight, Route
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import Activity
from layerstream.stages.threads import Threads, wait_all

__all__ = ["transfer_stage"]


# Longer than 60 lines: the two loops share the copies under way and read best side by side; a third is arguments.
async def transfer_stage(  # noqa: C901 - two short loops
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
    """Copy each batch that has segments and pass on the others, until cancelled.

    Computation gets a batch as soon as its copies are on the device's copy stream: it waits there for their
    event, not here. A second loop waits for the event on the host, to give the host slot back.

    A copy counts as work for as long as the device took for it. Until it begins, it counts as waiting for memory:
    for the computation that still reads its slot.

    Args:
        route: Gets back the batches that are dropped.
        source: Batches whose bytes have arrived.
        device: The destination.
        arena: The ring of device slots.
        residents: Batches that are copied once.
        threads: Two, one per loop.
        out: Takes the batches to compute with.
        clock: This stage's timings.
    """
    # Copies not yet known to be done. Two keep the copy stream busy; more would only hold host slots.
    copying: Channel[tuple[InFlight, HeldSlot | None, float, Event]] = Channel(2)
    sources: set[HeldSlot] = set()  # host slots that are being copied from
    times = _CopyTimes(clock)

    async def start() -> None:
        while True:
            since = time.perf_counter()
            item = await source.get()
            since = times.waited(Activity.WAITING_IN, since, item.batch.index)
            if item.wanted and item.needs_copy:
                with annotated("transfer", item.batch):
                    destination, after = await _take_destination(item, arena, residents)
                    queued = times.waited(Activity.WAITING_OUT, since, item.batch.index)
                    times.under_way += 1
                    begun = await _start_copies(item, destination, device, threads, after=after)
                # Only computation may still need the host image from here on. If it does not, the slot is
                # returned when the copy is done, whether or not the batch is dropped before.
                slot = None if item.batch.uses_host_image else item.detach_host_slot()
                if slot is not None:
                    sources.add(slot)
                await copying.put((item, slot, queued, begun))
            elif item.resident:
                item.device = residents.device_image(item.batch)
            if not item.wanted:
                route.drop(item)
                continue
            since = time.perf_counter()
            await out.put(item)
            times.waited(Activity.WAITING_OUT, since, item.batch.index)

    async def finish() -> None:
        while True:
            item, slot, queued, begun = await copying.get()
            with annotated("transfer", item.batch):
                assert item.copied is not None  # noqa: S101
                started, ended = await threads.run(_wait_for_times, device, begun, item.copied)
            times.copied(item.batch, queued=queued, begun=started, ended=ended)
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
        # The memory of both sides is freed after this, so no copy may be under way, not even one that no loop saw end.
        await wait_all([threads.submit(_wait_for_all_copies, device)])
        for slot in sources:
            slot.give_back()


class _CopyTimes:
    """The time of a stage whose two loops work and wait at once: while copies are under way, it works."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._finished = 0.0  # when the last copy ended
        self.under_way = 0  # copies that are queued and not known to be done

    def waited(self, activity: Activity, since: float, batch: int) -> float:
        """Count the time since ``since`` as ``activity``, except while copies ran; returns the current time."""
        now = time.perf_counter()
        if not self.under_way:
            self._clock.add(activity, max(since, self._finished), now, batch=batch)
        return now

    def copied(self, batch: LayerBatch, *, queued: float, begun: float, ended: float) -> None:
        """Count a copy that was queued at ``queued``, behind those before it."""
        queued = max(queued, self._finished)
        begun = self._clock.add(Activity.WAITING_OUT, queued, max(queued, begun), batch=batch.index)
        self._finished = self._clock.add(
            Activity.WORKING,
            begun,
            max(begun, ended),
            batch=batch.index,
            nbytes=batch.copied_bytes,
        )
        self.under_way -= 1


def _wait_for_times(device: Device, begun: Event, copied: Event) -> tuple[float, float]:
    """Wait until a copy is done; returns when it began and when it ended on the device."""
    copied.synchronize()
    now = time.perf_counter()  # used if the device has failed since
    begun_at, copied_at = device.passed_at(begun), device.passed_at(copied)
    return (now if begun_at is None else begun_at, now if copied_at is None else copied_at)


def _wait_for_all_copies(device: Device) -> None:
    device.copy((), after=()).synchronize()  # copies pass in order: when this one has, all have


async def _take_destination(
    item: InFlight, arena: RingArena, residents: Residents
) -> tuple[Image, tuple[Event, ...]]:
    """The device image for ``item``, and the events that must have passed before it is written."""
    batch = item.batch
    image = residents.device_image(batch)
    if image is not None:
        return image, ()
    slot = await arena.take(batch.device_bytes, batch=batch.index)
    item.device_slot = HeldSlot(arena, slot)
    return Image([(0, slot.tensor)]), slot.after


async def _start_copies(
    item: InFlight,
    destination: Image,
    device: Device,
    threads: Threads,
    *,
    after: tuple[Event, ...],
) -> Event:
    """Queue the copies of ``item`` to ``destination`` on the device; returns the event at which they begin."""
    item.device = destination
    assert item.host is not None  # noqa: S101
    begun, item.copied = await threads.run(
        _queue_copies, item.batch, item.host, destination, device, after
    )
    return begun


def _queue_copies(
    batch: LayerBatch, host: Image, destination: Image, device: Device, after: Sequence[Event]
) -> tuple[Event, Event]:
    # Here and not on the event loop: a mixture of experts has thousands.
    copies = [
        (
            destination.bytes(segment.device_offset, segment.nbytes),
            host.bytes(segment.host_offset, segment.nbytes),
        )
        for segment in batch.segments
    ]
    # Copies pass in order: an empty one passes when those before it and ``after`` have.
    return device.copy((), after=after), device.copy(copies, after=())
