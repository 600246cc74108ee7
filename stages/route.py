"""The order of the layer batches, and those that are under way from disk to computation."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from layerstream.stages.arena import RingArena, Slot
from layerstream.stages.batch import LayerBatch
from layerstream.stages.devices.protocol import Event
from layerstream.stages.memory import Image
from layerstream.stages.residents import Residents
from layerstream.stages.threads import wait_all

__all__ = ["HeldSlot", "InFlight", "Route"]


@dataclass(frozen=True, slots=True, eq=False)
class HeldSlot:
    """A slot together with its arena."""

    arena: RingArena
    slot: Slot

    def give_back(self, after: Sequence[Event] = ()) -> None:
        """Give the slot back; it is written again only once all of ``after`` have passed."""
        self.arena.give_back(self.slot, after)


@dataclass(slots=True, eq=False, kw_only=True)
class InFlight:
    """A layer batch on its way from disk to computation, with the slots that it holds."""

    batch: LayerBatch
    wanted: bool = True
    """False: no computation needs it, and the next stage that gets it drops it."""
    resident: bool = False
    """It has been loaded already: nothing is read."""
    reads: list[Future[tuple[float, float]]] = field(default_factory=list)
    host: Image | None = None
    device: Image | None = None
    copied: Event | None = None
    """Computation on the device image waits for it."""
    host_slot: HeldSlot | None = None
    device_slot: HeldSlot | None = None

    @property
    def needs_copy(self) -> bool:
        """Whether the transfer stage has to make a device image, even if its tensors are empty."""
        return self.batch.uses_device_image and not (self.resident and self.batch.device_resident)

    def detach_host_slot(self) -> HeldSlot | None:
        """Detach and return the host slot; the caller gives it back."""
        slot, self.host_slot, self.host = self.host_slot, None, None
        return slot

    def cancel(self) -> None:
        """Mark as not wanted, and cancel the reads that have not begun; the others are completed."""
        self.wanted = False
        for read in self.reads:
            read.cancel()

    def release(self, after: Sequence[Event]) -> None:
        """Give all slots back; the device slot is written again only once all of ``after`` have passed."""
        slots = ((self.host_slot, ()), (self.device_slot, after))
        self.host = self.device = self.host_slot = self.device_slot = None
        self.reads = []  # the error of one refers to the slot that it read into
        for held, events in slots:
            if held is not None:
                held.give_back(events)


class Route:
    """The order in which layer batches are read, sweep after sweep.

    It wraps around: the last batch of a sweep is followed by the first of the next one, assuming that the
    next sweep takes the same route. If it does not, ``redirect`` keeps those batches under way that the
    new route needs, in its order, and drops the rest.
    """

    def __init__(self, batches: Sequence[LayerBatch], residents: Residents) -> None:
        self._batches = tuple(batches)
        self._residents = residents
        self._order = tuple(range(len(self._batches)))
        self._position = 0  # in the order, of the batch that is read next
        self.under_way: deque[InFlight] = deque()  # in the order in which they are read

    def next(self) -> InFlight:
        """The next batch to read. The number under way is bounded by the size of the arenas, not here."""
        item = InFlight(batch=self._batches[self._order[self._position]])
        self._position = (self._position + 1) % len(self._order)
        self.under_way.append(item)
        return item

    def replace(self, batches: Sequence[LayerBatch]) -> None:
        """From here on, read these batches: the same ones, with other residents."""
        self._batches = tuple(batches)

    def recall(self) -> None:
        """Cancel everything under way, and begin the route again."""
        for item in self.under_way:
            item.cancel()
        self._position = 0

    def redirect(self, order: Sequence[int]) -> None:
        """From here on, batches arrive in ``order``, beginning with its first."""
        self._order, self._position = tuple(order), 0
        for item in self.under_way:
            if item.wanted and item.batch.index == self._order[self._position]:
                self._position = (self._position + 1) % len(self._order)
                continue
            item.cancel()

    def restart(self) -> None:
        """Make the next batch that arrives the first of the route."""
        self.redirect(self._order)

    def drop(self, item: InFlight) -> None:
        """Give back the slots of ``item``, which was not computed with: the device slot after its copies."""
        self.done(item, () if item.copied is None else (item.copied,))

    def done(self, item: InFlight, after: Sequence[Event]) -> None:
        """Give back the slots of ``item``: the device slot after ``after``, the computation that reads it."""
        if item not in self.under_way:  # dropped already: the pipeline was closed
            return
        self.under_way.remove(item)
        item.release(after)
        # A device resident whose copies have begun arrives in any case; loading it again would overwrite what
        # may be computed with by then.
        if item.copied is None or not item.batch.device_resident:
            self._residents.loading_ended(item.batch)

    async def empty(self) -> None:
        """Drop everything under way, once no thread writes into its slots. Call it after the stages have ended."""
        for item in tuple(self.under_way):
            item.cancel()
        for item in tuple(self.under_way):
            await wait_all(item.reads)
            self.drop(item)
