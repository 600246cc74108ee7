"""What is placed where: layer batches of one size, the rings for them, and which are resident. Pure."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.layout import PlannedLayer, layout_batch
from layerstream.pipeline.planning.plan import MemoryUse, ReaderKind
from layerstream.stages.arena import ring_bytes
from layerstream.stages.batch import LayerBatch

__all__ = ["Arenas", "Frame", "Need", "evenly"]

# A batch this many times as large as most decides the size of the ring for all.
_OVERSIZED = 2
# torch's allocator takes large blocks from the driver in multiples of this; smaller ones share one.
_DEVICE_BLOCK_BYTES = 2 << 20
_SMALL_BYTES = 1 << 20


class Arenas(NamedTuple):
    """Bytes of the two rings."""

    host: int
    device: int


class Need(NamedTuple):
    """Bytes that a choice takes on the host and on the device; on a CPU all is on the host."""

    host: int
    vram: int


_NOTHING = Need(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What all candidates with one reader have in common, and how they fill the budgets."""

    checkpoint: Checkpoint
    layers: Sequence[PlannedLayer]
    on_cpu: bool
    reader: ReaderKind
    host_budget: int
    vram_budget: int | None
    host_reserved: int
    vram_reserved: int
    kv_on_host_bytes: int = 0
    """Of a GPU's KV cache."""
    held_bytes: int = 0
    """Of host memory, which residents leave free."""

    @property
    def maps(self) -> bool:
        """Whether computation uses the mapping of the files, without slots."""
        return self.on_cpu and self.reader is ReaderKind.MMAP

    @property
    def always_resident(self) -> frozenset[str]:
        """Names of layers that must be resident."""
        return frozenset(layer.name for layer in self.layers if layer.always_resident)

    def batches(self, size: int, *, passing: Arenas | None = None) -> list[LayerBatch]:
        """All layers in batches of ``size`` blocks; those that must be resident are.

        Args:
            size: Blocks in a batch.
            passing: Rings that exist already; batches that are too large for them become resident.
        """
        always_resident = self.always_resident

        def stays(batch: LayerBatch) -> bool:
            large = passing is not None and (
                (batch.host_bytes > passing.host and not self.maps)
                or batch.device_bytes > passing.device
            )
            return large or not always_resident.isdisjoint(batch.layers)

        return [self._resident(batch) if stays(batch) else batch for batch in self._laid_out(size)]

    def _laid_out(self, size: int) -> list[LayerBatch]:
        groups: list[list[PlannedLayer]] = []
        for layer in self.layers:
            joins = (
                groups
                and layer.kind is groups[-1][0].kind is LayerKind.BLOCK
                and layer.always_resident == groups[-1][0].always_resident
                and len(groups[-1]) < size
            )
            if joins:
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return [
            layout_batch(
                group,
                index=index,
                file_bytes=[file.size_bytes for file in self.checkpoint.files],
                reads_host_images=self.on_cpu,
            )
            for index, group in enumerate(groups)
        ]

    def _resident(self, batch: LayerBatch, *, on_host: bool = False) -> LayerBatch:
        """``batch`` as a resident, where computation reads it; with ``on_host`` in host RAM, for a GPU."""
        if self.on_cpu:
            return dataclasses.replace(
                batch,
                host_resident=batch.uses_host_image and not self.maps,
                device_resident=batch.device_bytes > 0,
            )
        return dataclasses.replace(batch, host_resident=on_host, device_resident=not on_host)

    def arenas(self, batches: Sequence[LayerBatch], slots: int) -> Arenas:
        """The sizes of the host ring and the device ring for ``batches``, ``slots`` at a time."""
        # A resident of the device alone passes the host ring once, when it is loaded.
        passing = [b.host_bytes for b in batches if b.device_resident and not b.host_resident]
        host = max(
            ring_bytes([b.host_bytes for b in batches if b.streamed], slots=slots), *passing, 0, 0
        )
        device = ring_bytes([b.device_bytes for b in batches if not b.device_resident], slots=slots)
        return Arenas(0 if self.maps else host, device)

    def memory(
        self, batches: Sequence[LayerBatch], arenas: Arenas
    ) -> tuple[MemoryUse, MemoryUse | None]:
        """The use of the host budget and of the VRAM budget."""
        residents = (
            sum(batch.host_bytes for batch in batches if batch.host_resident),
            sum(batch.device_bytes for batch in batches if batch.device_resident),
        )
        reserved = (self.host_reserved, self.vram_reserved + self._scratch(batches))
        if self.vram_budget is None:  # the device's memory is the host's
            return (
                MemoryUse(
                    budget_bytes=self.host_budget,
                    arena_bytes=sum(arenas),
                    resident_bytes=sum(residents),
                    reserved_bytes=sum(reserved),
                ),
                None,
            )
        blocks = [_blocks(batch.device_bytes) for batch in batches if batch.device_resident]
        return (
            MemoryUse(
                budget_bytes=self.host_budget,
                arena_bytes=arenas.host,
                resident_bytes=residents[0],
                reserved_bytes=reserved[0],
            ),
            MemoryUse(
                budget_bytes=self.vram_budget,
                arena_bytes=_blocks(arenas.device),
                resident_bytes=sum(blocks),
                reserved_bytes=reserved[1],
            ),
        )

    def _scratch(self, batches: Sequence[LayerBatch]) -> int:
        """Tensors that computation makes from weights: of batches that are always resident for good, else of one batch at a time."""
        always_resident = self.always_resident
        for_good = [b.scratch_bytes for b in batches if always_resident.intersection(b.layers)]
        for_now = [b.scratch_bytes for b in batches if not always_resident.intersection(b.layers)]
        return sum(for_good) + max(for_now, default=0)

    def need(self, batches: Sequence[LayerBatch], arenas: Arenas) -> Need:
        """The bytes on either side, in sum."""
        host, device = self.memory(batches, arenas)
        return Need(host.used_bytes, 0 if device is None else device.used_bytes)

    def fits(self, need: Need, *, spare: Need = _NOTHING) -> bool:
        """Whether ``need`` fits into the budgets plus ``spare``."""
        return (
            need.host <= self.host_budget + spare.host
            and need.vram <= (self.vram_budget or 0) + spare.vram
        )

    def with_residents(
        self,
        batches: Sequence[LayerBatch],
        slots: int,
        *,
        oversized_first: bool,
        rings: Arenas | None = None,
    ) -> list[LayerBatch]:
        """Fill what is left of the budgets with residents: VRAM first, then host RAM.

        They are spread evenly. With ``oversized_first``, batches that are much larger than most become resident first,
        since each of them needs a ring that is mostly empty with the others. ``rings`` are those of a running
        pipeline; by default they have the size that the streamed batches need.
        """
        placed = list(batches)
        apart: set[int] = set()
        room = Need(-self.held_bytes, 0)
        for on_host in (True,) if self.on_cpu else (False, True):
            if oversized_first:
                for index in _oversized(placed):
                    tried = self._with(placed, {index}, on_host=on_host)
                    need = self.need(tried, rings or self.arenas(tried, slots))
                    if self.fits(need, spare=room):
                        placed = tried
                        apart.add(index)
            placed = self._evenly_filled(
                placed, slots=slots, arenas=rings, on_host=on_host, room=room
            )
        if self.on_cpu:
            return placed
        spread = self._spread([placed[b.index] if b.index in apart else b for b in batches], placed)
        fits = self.fits(self.need(spread, rings or self.arenas(spread, slots)), spare=room)
        return spread if fits else placed

    def _spread(
        self, batches: Sequence[LayerBatch], placed: Sequence[LayerBatch]
    ) -> list[LayerBatch]:
        """``batches`` with as many residents on either side as ``placed``, evenly spread over both sides together."""
        free = [b.index for b in batches if b.streamed]
        on_device = sum(placed[index].device_resident for index in free)
        stay = sum(not placed[index].streamed for index in free)
        chosen = [free[i] for i in evenly(len(free), stay)]
        devices = {chosen[i] for i in evenly(stay, on_device)}
        made = self._with(batches, devices, on_host=False)
        return self._with(made, set(chosen) - devices, on_host=True)

    def grown(
        self, batches: Sequence[LayerBatch], arenas: Arenas, *, spare: Need
    ) -> list[LayerBatch]:
        """``batches`` with more residents where computation runs, in memory that is ``spare`` for a while."""
        return self._evenly_filled(
            batches,
            arenas=arenas,
            on_host=self.on_cpu,
            room=spare._replace(host=spare.host - self.held_bytes),
        )

    def _evenly_filled(
        self,
        batches: Sequence[LayerBatch],
        *,
        on_host: bool,
        room: Need,
        slots: int = 0,
        arenas: Arenas | None = None,
    ) -> list[LayerBatch]:
        """``batches`` with as many residents as fit; with rings of a given size, or of the size that they need."""
        streamed = [b.index for b in batches if b.streamed]

        def tried(count: int) -> list[LayerBatch] | None:
            chosen = {streamed[i] for i in evenly(len(streamed), count)}
            made = self._with(batches, chosen, on_host=on_host)
            need = self.need(made, arenas or self.arenas(made, slots))
            return made if self.fits(need, spare=room) else None

        fewest, most, best = 0, len(streamed), list(batches)
        while (
            fewest < most
        ):  # more residents take more memory, except where the rings become smaller
            count = (fewest + most + 1) // 2
            made = tried(count)
            if made is None:
                most = count - 1
            else:
                fewest, best = count, made
        for count in (len(streamed), fewest + 1):  # if all are resident, no ring is needed
            if fewest < count <= len(streamed) and (made := tried(count)) is not None:
                return made
        return best

    def _with(
        self, batches: Iterable[LayerBatch], chosen: set[int], *, on_host: bool
    ) -> list[LayerBatch]:
        return [self._resident(b, on_host=on_host) if b.index in chosen else b for b in batches]


def _blocks(nbytes: int) -> int:
    """GPU memory that a tensor of ``nbytes`` takes."""
    if nbytes <= _SMALL_BYTES:
        return nbytes
    return -(-nbytes // _DEVICE_BLOCK_BYTES) * _DEVICE_BLOCK_BYTES


def evenly(among: int, count: int) -> list[int]:
    """``count`` of the numbers below ``among``, evenly spread, so that disk and compute are loaded evenly."""
    return [(2 * i + 1) * among // (2 * count) for i in range(count)]


def _oversized(batches: Sequence[LayerBatch]) -> list[int]:
    """Indices of streamed batches that are much larger than most, the largest first."""
    streamed = sorted(b.host_bytes for b in batches if b.streamed)
    if not streamed:
        return []
    typical = streamed[len(streamed) // 2]
    large = [b for b in batches if b.streamed and b.host_bytes > _OVERSIZED * typical]
    return [b.index for b in sorted(large, key=lambda b: -b.host_bytes)]
