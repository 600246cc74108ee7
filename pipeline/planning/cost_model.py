"""The predicted times of a placement: prices its layer batches in each stage, and simulates the stages. Pure."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.assumptions import Rates
from layerstream.pipeline.planning.compute_cost import ComputeCost, PassShape
from layerstream.pipeline.planning.expert_cells import ExpertCells
from layerstream.pipeline.planning.placement import ArenaBytes
from layerstream.pipeline.planning.plan import ReaderKind, Workload
from layerstream.pipeline.planning.planned_layer import PlannedLayer
from layerstream.pipeline.planning.prediction import Objective, Prediction
from layerstream.pipeline.planning.simulation import BatchCost, simulate
from layerstream.stages.batch import LayerBatch
from layerstream.stages.experts.expert_set import ExpertSet

__all__ = ["CostModel", "Placement"]

# Sweeps that count without a workload: enough that the first one does not decide.
_SWEEPS = 10
# Between two steps of a generation: sampling a token, and transformers' preparation of the next pass.
_BETWEEN_SECONDS = 2e-3
# At which two threads fill memory that the system has to provide first; a virtual machine with huge pages, measured.
_NEW_MEMORY_BYTES_PER_SECOND = 0.8e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Layer batches with their residence, and the arenas for the others."""

    reader: ReaderKind
    on_cpu: bool
    size: int
    slots: int
    arenas: ArenaBytes
    batches: Sequence[LayerBatch]
    decode_batches: Sequence[LayerBatch]
    """The same with decode residents."""
    page_cache_bytes: int
    """Memory for files in the page cache."""
    expert_cells: ExpertCells
    expert_bytes: int
    """Of the expert store in host memory."""
    device_expert_cells: ExpertCells
    """Those of a GPU."""
    device_expert_bytes: int
    """Of the expert store there."""
    expert_sets: Mapping[str, Sequence[ExpertSet]]
    """By the names of layers; with as many cells as there are."""
    kv_bytes_per_block: int = 0
    """Of a KV cache on the host, copied to the device and back."""

    @property
    def maps(self) -> bool:
        """Whether computation uses the mapping of the files, without slots."""
        return self.on_cpu and self.reader is ReaderKind.MMAP

    @property
    def loads_in_second_sweep(self) -> bool:
        """Whether residents are loaded by the second sweep: see ``Plan.at_first``."""
        return self.on_cpu and not self.maps


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Predicts times: everything that they depend on besides the placement."""

    layers: Mapping[str, PlannedLayer]
    """By name."""
    rates: Rates
    compute_cost: ComputeCost | None
    """None: nothing is computed."""
    workload: Workload | None
    objective: Objective
    throttle_bytes_per_second: float | None
    """Of a throttled reader."""
    cached_bytes: int
    """How much of the files is in the page cache when the first sweep begins."""

    def predict(self, placement: Placement) -> Prediction:
        """The predicted times of the workload with ``placement``."""
        prefill, decode = self._pass_shapes()
        residents = frozenset(b.index for b in placement.batches if not b.streamed)
        first = self._sweep(
            placement,
            prefill,
            [batch.with_residence(batch.residence) for batch in placement.batches],
            loaded=frozenset(),
            first=True,
            empty_cells=True,
        )
        prompt = self._sweep(placement, prefill, placement.batches, loaded=residents)
        # If the second sweep loads the residents, it reads everything as well.
        late = placement.loads_in_second_sweep and self.workload is not None
        second = self._sweep(
            placement,
            decode,
            placement.batches,
            loaded=frozenset() if late else residents,
            first=late,
            unpacks=True,
        )
        step = self._sweep(placement, decode, placement.decode_batches, loaded=None)
        sweeps = simulate(
            [first, second, step, step, prompt, step, step],
            host_ring_bytes=placement.arenas.host,
            device_ring_bytes=placement.arenas.device,
            overhead_seconds=self.rates.overhead_seconds_per_batch,
            between_seconds=0.0 if self.workload is None else _BETWEEN_SECONDS,
        )
        first_sweep, second_sweep, previous, steady, later_prompt, *_ = sweeps
        # If slots do not divide sweeps evenly, times of sweeps may alternate.
        steady = dataclasses.replace(steady, seconds=(previous.seconds + steady.seconds) / 2)
        steps = _SWEEPS - 1 if self.workload is None else self.workload.new_tokens - 1
        request_seconds = later_prompt.seconds + steps * steady.seconds
        if self.objective is Objective.LATENCY:
            request_seconds = first_sweep.seconds + steps * steady.seconds
            request_seconds += second_sweep.seconds - steady.seconds if steps else 0.0
        sequences = 1 if self.workload is None else self.workload.batch_size
        return Prediction(
            objective=self.objective,
            first=first_sweep,
            second=second_sweep,
            prefill=later_prompt,
            decode=steady,
            request_seconds=request_seconds,
            tokens_per_second=sequences / steady.seconds if steady.seconds > 0 else 0.0,
        )

    def _pass_shapes(self) -> tuple[PassShape | None, PassShape | None]:
        """A request's first pass and a typical later one; None without computation."""
        if self.compute_cost is None or self.workload is None:
            return None, None
        sequences, prompt = self.workload.batch_size, self.workload.prompt_tokens
        context = prompt + self.workload.new_tokens // 2
        return (
            PassShape(sequences=sequences, tokens=prompt, context=prompt, prompt=True),
            PassShape(sequences=sequences, tokens=1, context=context, prompt=False),
        )

    def _sweep(
        self,
        placement: Placement,
        shape: PassShape | None,
        batches: Sequence[LayerBatch],
        *,
        loaded: frozenset[int] | None,
        first: bool = False,
        empty_cells: bool = False,
        unpacks: bool = False,
    ) -> list[BatchCost]:
        """The costs of each batch of a sweep.

        Args:
            placement: With the readers and arenas.
            shape: Of the pass.
            batches: With their residence in this sweep.
            loaded: Residents that are loaded already; None: all.
            first: Whether it is the first one that reads.
            empty_cells: Whether no expert is there yet.
            unpacks: Whether it is the one that unpacks what is kept unpacked.
        """
        miss_share = self._miss_share(placement, batches, first=first)
        costs = []
        for batch in batches:
            visited = [
                layer for name in batch.layers if self._visits(layer := self.layers[name], shape)
            ]
            if not visited:
                continue
            is_loaded = not batch.streamed and (loaded is None or batch.index in loaded)
            costs.append(
                self._batch(
                    placement,
                    batch,
                    visited,
                    shape,
                    is_loaded=is_loaded,
                    miss_share=miss_share,
                    empty_cells=empty_cells,
                    unpacks=unpacks,
                )
            )
        return costs

    def _visits(self, layer: PlannedLayer, shape: PassShape | None) -> bool:
        return shape is None or self.compute_cost is None or self.compute_cost.visits(layer, shape)

    def _batch(
        self,
        placement: Placement,
        batch: LayerBatch,
        layers: Sequence[PlannedLayer],
        shape: PassShape | None,
        *,
        is_loaded: bool,
        miss_share: float,
        empty_cells: bool,
        unpacks: bool,
    ) -> BatchCost:
        read, processor = (0.0, 0.0) if is_loaded else self._read(placement, batch, miss_share)
        compute = 0.0
        if shape is not None and self.compute_cost is not None:
            compute = sum(
                self.compute_cost.seconds(
                    layer,
                    shape,
                    mapped=placement.maps,
                    unpacked=batch.unpacked_bytes > 0 and not unpacks,
                )
                for layer in layers
            )
            if unpacks:
                compute += batch.unpacked_bytes / _NEW_MEMORY_BYTES_PER_SECOND
        copied_bytes = 0 if is_loaded and batch.device_resident else batch.copied_bytes
        copy_rate = self.rates.host_copy if placement.on_cpu else self.rates.h2d
        if layers[0].kind is LayerKind.BLOCK:
            # The KV cache, both ways, in the thread that computes, which waits for it.
            kv_bytes = 2 * placement.kv_bytes_per_block * len(layers)
            compute += kv_bytes / self.rates.pageable_h2d
        each = [
            self._expert_seconds(placement, layer, shape, empty=empty_cells) for layer in layers
        ]
        expert_read, expert_copy = (sum(seconds) for seconds in zip(*each, strict=True))
        # Several are on their way at once, and each is copied when it has been read.
        expert_seconds = max(expert_read, expert_copy)
        takes_host_slot = not placement.maps and not is_loaded and not batch.host_resident
        return BatchCost(
            read_seconds=read,
            copy_seconds=copied_bytes / copy_rate,
            # On a CPU, reading takes processor time from the computation.
            compute_seconds=compute + (processor if placement.on_cpu and compute else 0.0),
            host_bytes=batch.host_bytes if takes_host_slot else 0,
            device_bytes=0 if batch.device_resident else batch.device_bytes,
            copied_away=not batch.uses_host_image,
            expert_seconds=expert_read,
            expert_copy_seconds=expert_copy,
            expert_wait_seconds=expert_seconds
            if shape is None or not shape.prompt
            else max(0.0, expert_seconds - compute),
        )

    def _read(
        self, placement: Placement, batch: LayerBatch, miss_share: float
    ) -> tuple[float, float]:
        """Seconds to read ``batch``, and processor seconds for that."""
        rates, nbytes = self.rates, batch.read_bytes
        if placement.reader is not ReaderKind.MMAP:
            throttle = self.throttle_bytes_per_second or math.inf
            seconds = nbytes / min(rates.disk, throttle)
            return seconds, nbytes * rates.direct_cpu_seconds_per_byte
        seconds = miss_share * nbytes / rates.mmap
        processor = miss_share * nbytes * rates.mmap_cpu_seconds_per_byte
        if not placement.on_cpu:  # copied from the mapping into a slot
            seconds += nbytes / rates.host_copy
        return seconds, processor

    def _expert_seconds(
        self, placement: Placement, layer: PlannedLayer, shape: PassShape | None, *, empty: bool
    ) -> tuple[float, float]:
        """Seconds to read the experts of ``layer`` that a pass is expected to need and does not find, and to copy them."""
        tokens = 1 if shape is None else shape.sequences * shape.tokens
        read = copied = 0.0
        for experts in placement.expert_sets.get(layer.name, ()):
            whole = experts.distinct(tokens) * experts.expert_bytes
            read += whole if empty else experts.missed_bytes(tokens)
            copied += whole if empty else experts.copied_bytes(tokens)
        rate = min(self.rates.disk, self.throttle_bytes_per_second or math.inf)
        seconds = read / (self.rates.mmap if placement.reader is ReaderKind.MMAP else rate)
        return seconds, 0.0 if placement.on_cpu else copied / self.rates.h2d

    def _miss_share(
        self, placement: Placement, batches: Sequence[LayerBatch], *, first: bool
    ) -> float:
        """The share of reads through the page cache that miss it."""
        if placement.reader is not ReaderKind.MMAP:
            return 1.0
        needed = sum(b.read_bytes for b in batches if first or b.streamed)
        if first:
            return max(0.0, 1 - self.cached_bytes / needed) if needed else 0.0
        # Cyclic reads through a cache that is too small never hit.
        return 0.0 if needed <= placement.page_cache_bytes else 1.0
