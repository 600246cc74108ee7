"""Finds the candidates for one plan that fit, and the fastest of them. Pure."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.compute_cost import Work
from layerstream.pipeline.planning.cost_model import Placement, Prices
from layerstream.pipeline.planning.placement import Frame, Need
from layerstream.pipeline.planning.plan import MemoryUse, ReaderKind
from layerstream.pipeline.planning.prediction import Prediction
from layerstream.pipeline.planning.problem import LEAST_SLOTS, SLOTS, Problem
from layerstream.stages.batch import LayerBatch
from layerstream.stages.errors import PlanError
from layerstream.stages.process.headroom import MARGIN
from layerstream.stages.text import format_bytes

__all__ = ["PricedChoice", "search"]

# Blocks per layer batch that are tried; larger batches bring nothing.
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_MOST_BATCH_BYTES = 1 << 30
# Times that differ by less than this share are equal; a larger one if the time of computation is not known.
_EQUAL = 0.01
_EQUAL_PAST_NOTHING = 0.1
# If the page cache holds this share of the files now, it is expected to keep them, unless it is part of a budget.
_CACHED = 0.9
# Workspaces of cuBLAS: 32 MiB on current GPUs for each of the two streams that may compute. Assumed.
_VRAM_FIXED_BYTES = 64 << 20
# Stacks of our threads, queues, and the tables of a few thousand tensors.
_FIXED_BYTES = 16 << 20
# Of a KV cache on the host, the layers that are on the device: one in use, one on its way.
_KV_LAYERS_ON_DEVICE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedChoice:
    """A placement with its predicted times."""

    frame: Frame
    placement: Placement
    prediction: Prediction
    name: str = ""

    @property
    def memory(self) -> tuple[MemoryUse, MemoryUse | None]:
        """Its use of the budgets."""
        return self.frame.memory(self.placement.batches, self.placement.arenas)

    @property
    def need(self) -> Need:
        """The same, in sum."""
        return self.frame.need(self.placement.batches, self.placement.arenas)

    @property
    def overlaps(self) -> bool:
        """Whether a batch can be read while another one is computed with."""
        return self.placement.maps or self.placement.slots > LEAST_SLOTS

    @property
    def _preference(self) -> tuple[bool, int, bool, int, int, int]:
        # What is left of a budget may be used: residents also help where the prediction is wrong, as with
        # a rate of computation that was measured while something else computed.
        slots = SLOTS.index(self.placement.slots)
        maps = self.placement.reader is ReaderKind.MMAP  # in memory that may be taken away
        # Mapped batches take no memory, so few large ones save hand-offs.
        handed_over = len(self.placement.batches) if self.placement.maps else 0
        read = sum(batch.read_bytes for batch in self.placement.batches if batch.streamed)
        return bool(self.name), slots, maps, handed_over, read, sum(self.need)


def search(problem: Problem) -> list[PricedChoice]:
    """All candidates for ``problem`` that fit: the best one first, the others by their time.

    Of equally fast ones, those with residents come first, then three slots, then the fewest bytes from disk.

    Raises:
        PlanError: None fits.
    """
    return _Search(problem).choices()


class _Search:
    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def choices(self) -> list[PricedChoice]:
        # A plan is not refused for what requests take besides tensors, but plans that leave memory for it come first.
        for kv_on_host, leaves_room in itertools.product(self._kv_places(), (True, False)):
            found = [
                choice
                for reader in self._readers()
                for choice in self._of_frame(
                    self._frame(reader, kv_on_host=kv_on_host), leaves_room=leaves_room
                )
            ]
            if found:
                break
        else:
            raise PlanError(self._too_small())
        found.sort(key=lambda choice: choice.prediction.request_seconds)
        overlapping = any(choice.overlaps for choice in found)
        able = [choice for choice in found if choice.overlaps or choice.name or not overlapping]
        tolerance = _EQUAL_PAST_NOTHING if self._problem.workload is None else _EQUAL
        most = able[0].prediction.request_seconds * (1 + tolerance)
        equal = [choice for choice in able if choice.prediction.request_seconds <= most]
        best = min(equal, key=lambda choice: choice._preference)  # noqa: SLF001 - it is ours
        return [best, *(choice for choice in found if choice is not best)]

    def _readers(self) -> tuple[ReaderKind, ...]:
        if self._problem.reader is not None:
            return (self._problem.reader,)
        room = self._problem.hardware.host_available_bytes * (1 - MARGIN)
        if (
            self._problem.on_cpu
            and self._problem.budget.host is None
            and self._problem.checkpoint.total_bytes <= room
        ):
            # The page cache has all of it, also for the next process; a copy of our own would be no faster.
            return (ReaderKind.MMAP,)
        return (ReaderKind.DIRECT, ReaderKind.MMAP)

    def _kv_places(self) -> tuple[bool, ...]:
        """The places of the KV cache to try, in this order: whether it is on the host."""
        problem = self._problem
        if problem.on_cpu or problem.memory is None:
            return (False,)
        return (False, True) if problem.kv_on_host is None else (problem.kv_on_host,)

    def _frame(self, reader: ReaderKind, *, kv_on_host: bool) -> Frame:
        kv = self._problem.memory.kv_bytes if kv_on_host and self._problem.memory is not None else 0
        blocks = sum(layer.kind is LayerKind.BLOCK for layer in self._problem.layers)
        kv_left = min(kv, kv * _KV_LAYERS_ON_DEVICE // max(blocks, 1))
        requests = self._problem.workload_bytes
        return Frame(
            checkpoint=self._problem.checkpoint,
            layers=self._problem.layers,
            on_cpu=self._problem.on_cpu,
            reader=reader,
            host_budget=self._problem.host_budget_bytes,
            vram_budget=self._problem.vram_budget_bytes,
            host_reserved=_FIXED_BYTES + (requests if self._problem.on_cpu else kv),
            vram_reserved=0
            if self._problem.on_cpu
            else _VRAM_FIXED_BYTES + requests - kv + kv_left,
            kv_on_host_bytes=kv,
            held_bytes=self._problem.overhead_bytes,
        )

    def _of_frame(self, frame: Frame, *, leaves_room: bool) -> Iterator[PricedChoice]:
        prices = self._prices()
        spare = Need(-self._problem.request_overhead_bytes if leaves_room else 0, 0)
        for size in self._sizes():
            batches = frame.batches(size, passing=self._problem.rings)
            for slots in self._slots(frame):
                rings = self._problem.rings or frame.arenas(batches, slots)
                if not frame.fits(frame.need(batches, rings), spare=spare):
                    continue
                seen: list[list[LayerBatch]] = []
                for oversized_first in (False, True):
                    placed = frame.with_residents(
                        batches, slots, rings=self._problem.rings, oversized_first=oversized_first
                    )
                    if placed not in seen:
                        seen.append(placed)
                        yield self._choice(frame, prices, placed, size=size, slots=slots)
            # The trivial plan is a candidate too: nothing worse is chosen, and it takes the least memory.
            slots = self._problem.slots or LEAST_SLOTS
            rings = self._problem.rings or frame.arenas(batches, slots)
            if frame.fits(frame.need(batches, rings), spare=spare):
                bare = self._choice(frame, prices, batches, size=size, slots=slots, grows=False)
                yield dataclasses.replace(bare, name="one batch at a time, no residents")

    def _slots(self, frame: Frame) -> tuple[int, ...]:
        if self._problem.slots is not None:
            return (self._problem.slots,)
        return SLOTS[:1] if frame.maps else SLOTS  # mapped batches take no slots

    def _sizes(self) -> list[int]:
        if self._problem.layer_batch_size is not None:
            return [self._problem.layer_batch_size]
        blocks = sorted(
            layer.nbytes for layer in self._problem.layers if layer.kind is LayerKind.BLOCK
        )
        if not blocks:
            return [1]
        typical = max(blocks[len(blocks) // 2], 1)
        most = min(len(blocks), max(_MOST_BATCH_BYTES // typical, 1))
        return sorted({min(size, most) for size in _SIZES})

    def _choice(
        self,
        frame: Frame,
        prices: Prices,
        batches: Sequence[LayerBatch],
        *,
        size: int,
        slots: int,
        grows: bool = True,
    ) -> PricedChoice:
        arenas = self._problem.rings or frame.arenas(batches, slots)
        blocks = sum(layer.kind is LayerKind.BLOCK for layer in self._problem.layers)
        placement = Placement(
            reader=frame.reader,
            on_cpu=self._problem.on_cpu,
            size=size,
            slots=slots,
            arenas=arenas,
            batches=batches,
            decode_batches=frame.grown(batches, arenas, spare=self._spare()) if grows else batches,
            kv_bytes_per_block=frame.kv_on_host_bytes // max(blocks, 1),
            page_room_bytes=self._page_room(frame, batches),
        )
        return PricedChoice(
            frame=frame,
            placement=placement,
            prediction=prices.price(placement),
        )

    def _spare(self) -> Need:
        """Memory for the activations of a prompt that is free while no prompt is processed."""
        if self._problem.memory is None:
            return Need(0, 0)
        spare = self._problem.memory.spare_bytes
        return Need(spare, 0) if self._problem.on_cpu else Need(0, spare)

    def _page_room(self, frame: Frame, batches: Sequence[LayerBatch]) -> int:
        """Memory for files in the page cache.

        A host budget is meant to include the page cache. So if there is one, only what is cached already counts, and only
        if that is almost everything.
        """
        free = int(self._problem.hardware.host_available_bytes * (1 - MARGIN))
        wanted = sum(batch.read_bytes for batch in batches)
        if (
            self._problem.budget.host is not None
            and self._problem.hardware.cached_bytes < _CACHED * wanted
        ):
            return 0
        return max(0, free - frame.need(batches, frame.arenas(batches, 1)).host)

    def _prices(self) -> Prices:
        return Prices(
            layers={layer.name: layer for layer in self._problem.layers},
            rates=self._problem.rates,
            work=Work(self._problem.checkpoint.config, self._problem.rates)
            if self._problem.workload is not None
            else None,
            workload=self._problem.workload,
            objective=self._problem.objective,
            throttle_bytes_per_second=self._problem.throttle_bytes_per_second,
            cached_bytes=self._problem.hardware.cached_bytes,
        )

    def _least(self, frame: Frame) -> Need:
        batches = frame.batches(self._problem.layer_batch_size or 1, passing=self._problem.rings)
        return frame.need(
            batches, self._problem.rings or frame.arenas(batches, self._problem.slots or 1)
        )

    def _too_small(self) -> str:
        frames = [
            self._frame(reader, kv_on_host=kv_on_host)
            for reader in self._readers()
            for kv_on_host in self._kv_places()
        ]
        frame, need = min(((frame, self._least(frame)) for frame in frames), key=_lacks)
        nbytes, name = max((layer.nbytes, layer.name) for layer in self._problem.layers)
        side, needed, have, kept = (
            ("host", need.host, frame.host_budget, frame.host_reserved)
            if need.host > frame.host_budget
            else ("VRAM", need.vram, frame.vram_budget or 0, frame.vram_reserved)
        )
        reserved = format_bytes(kept)
        return (
            f"the {side} budget of {format_bytes(have)} cannot hold one layer at a time: at least "
            f"{format_bytes(needed)} are needed (the largest layer, {name}, has {format_bytes(nbytes)}; "
            f"{reserved} are reserved for the workload); raise the budget, or ask for fewer tokens at a time"
        )


def _lacks(tried: tuple[Frame, Need]) -> tuple[int, int]:
    """The bytes by which the budgets are too small."""
    frame, need = tried
    vram = max(0, need.vram - (frame.vram_budget or 0))
    return vram + max(0, need.host - frame.host_budget), sum(need)
