"""What is placed where: layer batches of one size, the arenas for them, and which are resident. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from layerstream.pipeline.planning.layout import Layouts
from layerstream.pipeline.planning.plan import MemoryUse, ReaderKind
from layerstream.pipeline.planning.resident_choice import evenly, oversized_batches
from layerstream.stages.arena import ring_bytes
from layerstream.stages.batch import LayerBatch, Residence
from layerstream.stages.memory import round_up

__all__ = ["DEVICE_BLOCK_BYTES", "ArenaBytes", "MemoryBytes", "Placer"]

# torch's allocator takes large blocks from the driver in multiples of this; small ones share one.
DEVICE_BLOCK_BYTES = 2 << 20
_SMALL_BYTES = 1 << 20


class ArenaBytes(NamedTuple):
    """Bytes of the two rings of slots."""

    host: int
    device: int


class MemoryBytes(NamedTuple):
    """Bytes on the host and on the device; on a CPU all are on the host."""

    host: int
    vram: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placer:
    """Places the layer batches of candidates that have the reader and the place of the KV cache in common."""

    layouts: Layouts
    on_cpu: bool
    reader: ReaderKind
    host_budget_bytes: int
    host_usable_bytes: int
    """Of the host budget, what is free: code that was loaded for the model may have taken the rest."""
    vram_budget_bytes: int | None
    host_reserved_bytes: int
    vram_reserved_bytes: int
    kv_on_host_bytes: int = 0
    """Of a GPU's KV cache in host RAM."""
    overhead_bytes: int = 0
    """Of the usable host memory, what residents leave free."""
    expert_bytes: int = 0
    """The least that experts on demand take of the host budget; what residents leave is theirs, too."""
    device_expert_bytes: int = 0
    """The same of the VRAM budget."""
    adapter_bytes: int = 0
    """Weights of adapters, which are resident where computation runs."""

    @property
    def maps(self) -> bool:
        """Whether computation uses the mapping of the files, without slots."""
        return self.on_cpu and self.reader is ReaderKind.MMAP

    @property
    def always_resident(self) -> frozenset[str]:
        """Names of the layers that must be resident."""
        return frozenset(layer.name for layer in self.layouts.layers if layer.always_resident)

    def batches(self, size: int, *, arenas: ArenaBytes | None = None) -> list[LayerBatch]:
        """All layers in batches of ``size`` blocks; those that must be resident are.

        Args:
            size: Blocks in a batch.
            arenas: Those of a running pipeline; batches that are too large for them become resident.
        """
        always_resident = self.always_resident

        def placed(batch: LayerBatch) -> LayerBatch:
            for_host = arenas is not None and batch.host_bytes > arenas.host and not self.maps
            for_device = arenas is not None and batch.device_bytes > arenas.device
            if (
                for_host and not self.on_cpu
            ):  # a resident of the device alone is read into a host slot
                return batch.with_residence(Residence.BOTH if for_device else Residence.HOST)
            if for_host or for_device or not always_resident.isdisjoint(batch.layers):
                return self._resident(batch)
            return batch

        return list(map(placed, self.layouts.of_size(size)))

    def _resident(self, batch: LayerBatch, *, on_host: bool = False) -> LayerBatch:
        """``batch`` as a resident, where computation reads it; with ``on_host`` in host RAM, for a GPU."""
        if self.on_cpu:
            return batch.with_residence(batch.residence_on_cpu(mapped=self.maps))
        return batch.with_residence(Residence.HOST if on_host else Residence.DEVICE)

    def arenas(self, batches: Sequence[LayerBatch], slots: int) -> ArenaBytes:
        """The sizes of the host ring and the device ring for ``batches``, ``slots`` at a time."""
        # A resident of the device alone takes a host slot once, when it is loaded.
        loaded_once = [b.host_bytes for b in batches if b.residence is Residence.DEVICE]
        streamed = [b.host_bytes for b in batches if b.streamed]
        host = max(ring_bytes(streamed, slots=slots), *loaded_once, 0)
        device = ring_bytes([b.device_bytes for b in batches if not b.device_resident], slots=slots)
        return ArenaBytes(0 if self.maps else host, device)

    def memory(
        self, batches: Sequence[LayerBatch], arenas: ArenaBytes
    ) -> tuple[MemoryUse, MemoryUse | None]:
        """The use of the host budget and of the VRAM budget."""
        residents = (
            sum(batch.host_bytes for batch in batches if batch.host_resident)
            + sum(batch.unpacked_bytes for batch in batches),
            sum(batch.device_bytes for batch in batches if batch.device_resident),
        )
        reserved = (self.host_reserved_bytes, self.vram_reserved_bytes + self._scratch(batches))
        if self.vram_budget_bytes is None:  # the device's memory is the host's
            return (
                MemoryUse(
                    budget_bytes=self.host_budget_bytes,
                    arena_bytes=sum(arenas),
                    resident_bytes=sum(residents),
                    reserved_bytes=sum(reserved),
                    expert_bytes=self.expert_bytes,
                    adapter_bytes=self.adapter_bytes,
                ),
                None,
            )
        allocated = [
            _allocated_bytes(batch.device_bytes) for batch in batches if batch.device_resident
        ]
        return (
            MemoryUse(
                budget_bytes=self.host_budget_bytes,
                arena_bytes=arenas.host,
                resident_bytes=residents[0],
                reserved_bytes=reserved[0],
                expert_bytes=self.expert_bytes,
            ),
            MemoryUse(
                budget_bytes=self.vram_budget_bytes,
                arena_bytes=_allocated_bytes(arenas.device),
                resident_bytes=sum(allocated),
                reserved_bytes=reserved[1],
                expert_bytes=self.device_expert_bytes,
                adapter_bytes=self.adapter_bytes,
            ),
        )

    def _scratch(self, batches: Sequence[LayerBatch]) -> int:
        """Tensors made from weights: kept for batches that must be resident, else for one batch at a time."""
        always_resident = self.always_resident
        kept = [b.scratch_bytes for b in batches if not always_resident.isdisjoint(b.layers)]
        temporary = [b.scratch_bytes for b in batches if always_resident.isdisjoint(b.layers)]
        return sum(kept) + max(temporary, default=0)

    def need(self, batches: Sequence[LayerBatch], arenas: ArenaBytes) -> MemoryBytes:
        """The total bytes on each side."""
        host, device = self.memory(batches, arenas)
        return MemoryBytes(host.used_bytes, 0 if device is None else device.used_bytes)

    def fits(self, need: MemoryBytes, *, spare: MemoryBytes) -> bool:
        """Whether ``need`` fits into the budgets plus ``spare``, which may be negative."""
        return (
            need.host <= self.host_usable_bytes + spare.host
            and need.vram <= (self.vram_budget_bytes or 0) + spare.vram
        )

    def with_residents(
        self,
        batches: Sequence[LayerBatch],
        slots: int,
        *,
        oversized_first: bool,
        arenas: ArenaBytes | None = None,
    ) -> list[LayerBatch]:
        """Fill the rest of the budgets with residents: VRAM first, then host RAM.

        They are spread evenly. With ``oversized_first``, batches that are much larger than most become resident first,
        since each of them needs a ring that is mostly empty with the others. ``arenas`` are those of a running
        pipeline; by default they have the sizes that the streamed batches need.
        """
        placed = list(batches)
        oversized: set[int] = set()
        spare = MemoryBytes(-self.overhead_bytes, 0)
        for on_host in (True,) if self.on_cpu else (False, True):
            if oversized_first:
                for index in oversized_batches(placed):
                    trial = self._with(placed, {index}, on_host=on_host)
                    need = self.need(trial, arenas or self.arenas(trial, slots))
                    if self.fits(need, spare=spare):
                        placed = trial
                        oversized.add(index)
            placed = self._evenly_filled(
                placed, slots=slots, arenas=arenas, on_host=on_host, spare=spare
            )
        if self.on_cpu:
            return placed
        spread = self._spread(
            [placed[b.index] if b.index in oversized else b for b in batches], placed
        )
        need = self.need(spread, arenas or self.arenas(spread, slots))
        return spread if self.fits(need, spare=spare) else placed

    def _spread(
        self, batches: Sequence[LayerBatch], placed: Sequence[LayerBatch]
    ) -> list[LayerBatch]:
        """``batches`` with as many residents on each side as ``placed``, evenly spread over both sides together."""
        streamed = [b.index for b in batches if b.streamed]
        on_device = sum(placed[index].device_resident for index in streamed)
        residents = sum(not placed[index].streamed for index in streamed)
        chosen = [streamed[i] for i in evenly(len(streamed), residents)]
        device_indices = {chosen[i] for i in evenly(residents, on_device)}
        spread = self._with(batches, device_indices, on_host=False)
        return self._with(spread, set(chosen) - device_indices, on_host=True)

    def with_decode_residents(
        self, batches: Sequence[LayerBatch], arenas: ArenaBytes, *, spare: MemoryBytes
    ) -> list[LayerBatch]:
        """``batches`` with more residents where computation runs, in memory that is ``spare`` while decoding."""
        return self._evenly_filled(
            batches,
            arenas=arenas,
            on_host=self.on_cpu,
            spare=spare._replace(host=spare.host - self.overhead_bytes),
        )

    def _evenly_filled(
        self,
        batches: Sequence[LayerBatch],
        *,
        on_host: bool,
        spare: MemoryBytes,
        slots: int = 0,
        arenas: ArenaBytes | None = None,
    ) -> list[LayerBatch]:
        """``batches`` with as many residents as fit; with ``arenas``, or with such as ``slots`` slots need."""
        streamed = [b.index for b in batches if b.streamed and not b.unpacked_bytes]
        most = self._most_residents(batches, arenas or ArenaBytes(0, 0), on_host, spare)
        # From the most that could fit: if all are resident, there is no ring, and more may fit than with a few less.
        for count in range(most, 0, -1):
            chosen = {streamed[i] for i in evenly(len(streamed), count)}
            trial = self._with(batches, chosen, on_host=on_host)
            if self.fits(self.need(trial, arenas or self.arenas(trial, slots)), spare=spare):
                return trial
        return list(batches)

    def _most_residents(
        self, batches: Sequence[LayerBatch], arenas: ArenaBytes, on_host: bool, spare: MemoryBytes
    ) -> int:
        """How many more of ``batches`` fit into memory beside ``arenas``, if they are the smallest."""
        need = self.need(batches, arenas)
        residents = (
            self._resident(b, on_host=on_host)
            for b in batches
            if b.streamed and not b.unpacked_bytes
        )
        if on_host or self.on_cpu:
            free = self.host_usable_bytes + spare.host - need.host
            sizes = [
                b.host_bytes * b.host_resident + b.device_bytes * b.device_resident
                for b in residents
            ]
        else:
            free = (self.vram_budget_bytes or 0) + spare.vram - need.vram
            sizes = [_allocated_bytes(b.device_bytes) for b in residents]
        return bisect_right(list(accumulate(sorted(sizes))), free)

    def _with(
        self, batches: Iterable[LayerBatch], chosen: set[int], *, on_host: bool
    ) -> list[LayerBatch]:
        return [self._resident(b, on_host=on_host) if b.index in chosen else b for b in batches]


def _allocated_bytes(nbytes: int) -> int:
    """GPU memory that a tensor of ``nbytes`` takes."""
    if nbytes <= _SMALL_BYTES:
        return nbytes
    return round_up(nbytes, DEVICE_BLOCK_BYTES)
