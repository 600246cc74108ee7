"""Finds the candidates for a plan that fit, and the fastest of them. Pure."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.choices import LEAST_SLOTS
from layerstream.pipeline.planning.compute_cost import ComputeCost
from layerstream.pipeline.planning.cost_model import CostModel, Placement
from layerstream.pipeline.planning.expert_cells import (
    ExpertMemory,
    copied_bytes,
    read_buffer_bytes,
    sources_of,
)
from layerstream.pipeline.planning.placement import MemoryBytes, Placer
from layerstream.pipeline.planning.plan import ReaderKind
from layerstream.pipeline.planning.plan_refusal import refusal
from layerstream.pipeline.planning.priced_candidate import PricedCandidate
from layerstream.pipeline.planning.problem import READ_REQUEST_BYTES, READS_IN_FLIGHT, Problem
from layerstream.pipeline.planning.unpacked_residents import placements
from layerstream.stages.batch import LayerBatch
from layerstream.stages.process.headroom import MARGIN

__all__ = ["search"]

# Blocks per layer batch that are tried; larger batches gain nothing.
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_MOST_BATCH_BYTES = 1 << 30
# More slots cover jitter, they do not add bandwidth: one is computed with, one is ready, one is being read. A fourth was the
# fastest choice in none of some hundred plans of all kinds. Of equally fast numbers the first is chosen.
_SLOTS = (3, 2, LEAST_SLOTS)
# Times that differ by less than this share are equal; a larger one if the time of computation is not known.
_EQUAL_SHARE = 0.01
_EQUAL_SHARE_WITHOUT_COMPUTE = 0.1
# Workspaces of cuBLAS: 32 MiB on current GPUs for each of the two streams that may compute. Assumed.
_VRAM_FIXED_BYTES = 64 << 20
# Stacks of our threads, queues, and the tables of a few thousand tensors.
_HOST_FIXED_BYTES = 16 << 20


def search(problem: Problem) -> list[PricedCandidate]:
    """All candidates for ``problem`` that fit: the best one first, the others by their time.

    Of equally fast ones, those with residents come first, then three slots, then the fewest bytes from disk. The best one is
    chosen as if no file was in the page cache, so that an equal problem has one answer; predictions are for what it holds.

    Raises:
        PlanError: None fits.
    """
    return _Search(problem).ranked()


class _Search:
    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        sources = sources_of(problem.layers)
        self._experts = ExpertMemory(
            layers=problem.layers,
            given=problem.expert_cells,
            usage=problem.hardware.expert_usage,
            more_bytes=read_buffer_bytes(
                sources,
                request_bytes_at_most=READ_REQUEST_BYTES,
                reads_in_flight=READS_IN_FLIGHT,
            ),
        )
        self._device_experts = ExpertMemory(
            layers=() if problem.on_cpu else problem.layers,
            given=problem.device_expert_cells,
            usage=problem.hardware.expert_usage,
            more_bytes=copied_bytes(sources),
        )

    def ranked(self) -> list[PricedCandidate]:
        found = self._fitting()
        found.sort(key=lambda candidate: candidate.prediction.request_seconds)
        overlapping = any(candidate.overlaps for candidate in found)
        eligible = [each for each in found if each.overlaps or each.name or not overlapping]
        without_compute = self._problem.choices.workload is None
        tolerance = _EQUAL_SHARE_WITHOUT_COMPUTE if without_compute else _EQUAL_SHARE
        limit = eligible[0].prediction.request_seconds * (1 + tolerance)
        equal = [each for each in eligible if each.prediction.request_seconds <= limit]
        best = min(equal, key=lambda candidate: candidate.preference)
        others = [self._priced_now(each) for each in found if each is not best]
        others.sort(key=lambda candidate: candidate.prediction.request_seconds)
        return [self._priced_now(best), *others]

    def _priced_now(self, candidate: PricedCandidate) -> PricedCandidate:
        """``candidate`` with predictions for what the page cache holds now."""
        cached_bytes = self._problem.hardware.cached_bytes
        if not cached_bytes or candidate.placement.reader is not ReaderKind.MMAP:
            return candidate
        cost_model = self._cost_model(cached_bytes=cached_bytes)
        return dataclasses.replace(candidate, prediction=cost_model.predict(candidate.placement))

    def _fitting(self) -> list[PricedCandidate]:
        for kv_on_host in self._kv_places():
            placers = [self._placer(reader, kv_on_host=kv_on_host) for reader in self._readers()]
            found = [candidate for placer in placers for candidate in self._candidates(placer)]
            # Code counts in the budget, too: what leaves it free is taken, if anything does.
            if roomy := [each for each in found if each.leaves_code_free] or found:
                return roomy
        placers = [
            self._placer(reader, kv_on_host=kv_on_host)
            for reader in self._readers()
            for kv_on_host in self._kv_places()
        ]
        needs = [(placer, self._least_need(placer)) for placer in placers]
        raise refusal(self._problem, needs, fewest_experts=self._experts.fewest.shared)

    def _readers(self) -> tuple[ReaderKind, ...]:
        if not self._problem.mappable:
            return (self._problem.choices.reader or ReaderKind.DIRECT,)
        if self._problem.choices.reader is not None:
            return (self._problem.choices.reader,)
        available = self._problem.hardware.host_available_bytes * (1 - MARGIN)
        if (
            self._problem.on_cpu
            and self._problem.choices.budget.host is None
            and self._problem.checkpoint.total_bytes <= available
        ):
            # The page cache holds all of it, also for the next process; a copy of our own would be no faster.
            return (ReaderKind.MMAP,)
        return (ReaderKind.DIRECT, ReaderKind.MMAP)

    def _kv_places(self) -> tuple[bool, ...]:
        """The places of the KV cache to try, in this order: whether it is on the host."""
        problem = self._problem
        if problem.on_cpu or problem.memory is None:
            return (False,)
        return (False, True) if problem.kv_on_host is None else (problem.kv_on_host,)

    def _placer(self, reader: ReaderKind, *, kv_on_host: bool) -> Placer:
        problem = self._problem
        kv = problem.memory.kv_bytes if kv_on_host and problem.memory is not None else 0
        requests = problem.workload_bytes
        return Placer(
            layouts=problem.layouts,
            on_cpu=problem.on_cpu,
            reader=reader,
            host_budget_bytes=problem.host_budget_bytes,
            host_usable_bytes=problem.host_usable_bytes,
            vram_budget_bytes=problem.vram_budget_bytes,
            host_reserved_bytes=_HOST_FIXED_BYTES
            + problem.unpacked_once.nbytes
            + problem.request_overhead_bytes
            + (requests if problem.on_cpu else kv),
            vram_reserved_bytes=0
            if problem.on_cpu
            else _VRAM_FIXED_BYTES + requests - kv + problem.kv_on_device_bytes(kv),
            kv_on_host_bytes=kv,
            overhead_bytes=problem.left_free_bytes,
            expert_bytes=self._experts.nbytes(self._experts.fewest),
            device_expert_bytes=self._device_experts.nbytes(self._device_experts.fewest),
            adapter_bytes=problem.adapters.nbytes,
        )

    def _candidates(self, placer: Placer) -> Iterator[PricedCandidate]:
        problem = self._problem
        priced = partial(self._priced, placer, self._cost_model())
        spare = MemoryBytes(0, 0)
        for size in self._sizes():
            batches = placer.batches(size, arenas=problem.arenas)
            for slots in self._slots(placer):
                arenas = problem.arenas or placer.arenas(batches, slots)
                if not placer.fits(placer.need(batches, arenas), spare=spare):
                    continue
                share, fixed = problem.unpacked_share, problem.arenas
                for placed in placements(
                    placer, batches, slots, arenas=fixed, unpacked_share=share
                ):
                    yield priced(placed, size=size, slots=slots)
            # The trivial plan is a candidate too: nothing worse is chosen, and it takes the least memory.
            slots = problem.choices.slots or LEAST_SLOTS
            arenas = problem.arenas or placer.arenas(batches, slots)
            if placer.fits(placer.need(batches, arenas), spare=spare):
                trivial = priced(batches, size=size, slots=slots, decode_residents=False)
                yield dataclasses.replace(trivial, name="one batch at a time, no residents")

    def _slots(self, placer: Placer) -> tuple[int, ...]:
        if self._problem.choices.slots is not None:
            return (self._problem.choices.slots,)
        return _SLOTS[:1] if placer.maps else _SLOTS  # mapped batches take no slots

    def _sizes(self) -> list[int]:
        if self._problem.choices.layer_batch_size is not None:
            return [self._problem.choices.layer_batch_size]
        blocks = sorted(
            layer.nbytes for layer in self._problem.layers if layer.kind is LayerKind.BLOCK
        )
        if not blocks:
            return [1]
        typical = max(blocks[len(blocks) // 2], 1)
        most = self._problem.unpacked_once.layers or len(blocks)
        most = min(most, len(blocks), max(_MOST_BATCH_BYTES // typical, 1))
        return sorted({min(size, most) for size in _SIZES})

    def _priced(
        self,
        placer: Placer,
        cost_model: CostModel,
        batches: Sequence[LayerBatch],
        *,
        size: int,
        slots: int,
        decode_residents: bool = True,
    ) -> PricedCandidate:
        arenas = self._problem.arenas or placer.arenas(batches, slots)
        blocks = self._problem.block_count
        # What residents leave: a byte of the trunk is read in every sweep, one of an expert in some.
        need = placer.need(batches, arenas)
        free = placer.host_usable_bytes - need.host - placer.overhead_bytes
        device_free = (placer.vram_budget_bytes or 0) - need.vram
        device_cells = self._device_experts.filled(free_bytes=device_free)
        # What is all in VRAM only passes through host memory.
        if self._device_experts.holds_all(device_cells):
            free = 0
        cells = self._experts.filled(free_bytes=free)
        expert_bytes = self._experts.nbytes(cells)
        device_expert_bytes = self._device_experts.nbytes(device_cells)
        spare = self._decode_spare()
        spare = MemoryBytes(
            spare.host - (expert_bytes - placer.expert_bytes),
            spare.vram - (device_expert_bytes - placer.device_expert_bytes),
        )
        placement = Placement(
            reader=placer.reader,
            on_cpu=self._problem.on_cpu,
            size=size,
            slots=slots,
            arenas=arenas,
            batches=batches,
            decode_batches=placer.with_decode_residents(batches, arenas, spare=spare)
            if decode_residents
            else batches,
            expert_cells=cells,
            expert_bytes=expert_bytes,
            device_expert_cells=device_cells,
            device_expert_bytes=device_expert_bytes,
            expert_sets=self._experts.sets_by_layer(cells, device_cells),
            kv_bytes_per_block=placer.kv_on_host_bytes // max(blocks, 1),
            page_cache_bytes=self._page_cache_bytes(placer, batches),
        )
        return PricedCandidate(
            placer=placer, placement=placement, prediction=cost_model.predict(placement)
        )

    def _decode_spare(self) -> MemoryBytes:
        """Memory for the activations of a prompt, which is free while no prompt is processed."""
        if self._problem.memory is None:
            return MemoryBytes(0, 0)
        spare = self._problem.memory.spare_bytes
        return MemoryBytes(spare, 0) if self._problem.on_cpu else MemoryBytes(0, spare)

    def _page_cache_bytes(self, placer: Placer, batches: Sequence[LayerBatch]) -> int:
        """Memory for files in the page cache: what is free beside the plan. A budget bounds what the process holds."""
        available = int(self._problem.hardware.host_available_bytes * (1 - MARGIN))
        return max(0, available - placer.need(batches, placer.arenas(batches, 1)).host)

    def _cost_model(self, *, cached_bytes: int = 0) -> CostModel:
        problem = self._problem
        return CostModel(
            layers={layer.name: layer for layer in problem.layers},
            rates=problem.rates,
            compute_cost=ComputeCost(
                problem.checkpoint.config, problem.rates, fused_tokens=problem.fused_tokens
            )
            if problem.choices.workload is not None
            else None,
            workload=problem.choices.workload,
            objective=problem.choices.objective,
            throttle_bytes_per_second=problem.choices.throttle_bytes_per_second,
            cached_bytes=cached_bytes,
        )

    def _least_need(self, placer: Placer) -> MemoryBytes:
        problem = self._problem
        batches = placer.batches(problem.choices.layer_batch_size or 1, arenas=problem.arenas)
        arenas = problem.arenas or placer.arenas(batches, problem.choices.slots or 1)
        return placer.need(batches, arenas)
