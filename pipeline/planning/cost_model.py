"""The predicted time of a placement: applies rates and work to layer batches, and simulates the stages. Pure."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.assumptions import Rates
from layerstream.pipeline.planning.compute_cost import PassShape, Work
from layerstream.pipeline.planning.layout import PlannedLayer
from layerstream.pipeline.planning.placement import Arenas
from layerstream.pipeline.planning.plan import ReaderKind, Workload
from layerstream.pipeline.planning.prediction import Objective, Prediction
from layerstream.pipeline.planning.simulation import BatchCost, simulate
from layerstream.stages.batch import LayerBatch

__all__ = ["Placement", "Prices"]

# Sweeps that count without a workload: enough that the first one does not decide.
_SWEEPS = 10
# Between two steps of a generation: sampling a token, and transformers' preparation of the next pass.
_BETWEEN_SECONDS = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Layer batches with their residence, and the rings for the others."""

    reader: ReaderKind
    on_cpu: bool
    size: int
    slots: int
    arenas: Arenas
    batches: Sequence[LayerBatch]
    decode_batches: Sequence[LayerBatch]
    """The same with decode residents."""
    page_room_bytes: int
    """Memory for files in the page cache."""
    kv_bytes_per_block: int = 0
    """Of a KV cache on the host, copied to the device and back."""

    @property
    def maps(self) -> bool:
        """Whether computation uses the mapping of the files, without slots."""
        return self.on_cpu and self.reader is ReaderKind.MMAP

    @property
    def keeps_late(self) -> bool:
        """Whether residents are loaded by the second sweep: see ``Plan.at_first``."""
        return self.on_cpu and not self.maps


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """All that a predicted time depends on, besides the placement.

    Attributes:
        layers: By name.
        rates: Of the machine.
        work: The model's computation; None: there is none.
        workload: One request.
        objective: Which sweeps count.
        throttle_bytes_per_second: Of a throttled reader.
        cached_bytes: How much of the files is in the page cache when the first sweep begins.
    """

    layers: Mapping[str, PlannedLayer]
    rates: Rates
    work: Work | None
    workload: Workload | None
    objective: Objective
    throttle_bytes_per_second: float | None
    cached_bytes: int

    def price(self, placement: Placement) -> Prediction:
        """The predicted times of the workload with ``placement``."""
        prefill, decode = self.passes()
        loaded = frozenset(b.index for b in placement.batches if not b.streamed)
        first = self._sweep(placement, prefill, placement.batches, loaded=frozenset(), first=True)
        prompt = self._sweep(placement, prefill, placement.batches, loaded=loaded)
        # If the second sweep loads the residents, it reads everything as well.
        late = placement.keeps_late and self.workload is not None
        second = self._sweep(
            placement,
            decode,
            placement.batches,
            loaded=frozenset() if late else loaded,
            first=late,
        )
        step = self._sweep(placement, decode, placement.decode_batches, loaded=None)
        costs = simulate(
            [first, second, step, step, prompt, step, step],
            host_ring_bytes=placement.arenas.host,
            device_ring_bytes=placement.arenas.device,
            overhead_seconds=self.rates.overhead_seconds_per_batch,
            between_seconds=0.0 if self.workload is None else _BETWEEN_SECONDS,
        )
        begins, loads, _, steady, later, *_ = costs
        # If slots do not divide sweeps evenly, times of sweeps may alternate.
        steady = dataclasses.replace(steady, seconds=(costs[2].seconds + steady.seconds) / 2)
        steps = _SWEEPS - 1 if self.workload is None else self.workload.new_tokens - 1
        request = later.seconds + steps * steady.seconds
        if self.objective is Objective.LATENCY:
            request = begins.seconds + steps * steady.seconds
            request += loads.seconds - steady.seconds if steps else 0.0
        sequences = 1 if self.workload is None else self.workload.batch_size
        return Prediction(
            objective=self.objective,
            first=begins,
            second=loads,
            prefill=later,
            decode=steady,
            request_seconds=request,
            tokens_per_second=sequences / steady.seconds if steady.seconds > 0 else 0.0,
        )

    def passes(self) -> tuple[PassShape | None, PassShape | None]:
        """A request's first pass and a typical later one; None without computation."""
        if self.work is None or self.workload is None:
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
        forward: PassShape | None,
        batches: Sequence[LayerBatch],
        *,
        loaded: frozenset[int] | None,
        first: bool = False,
    ) -> list[BatchCost]:
        """The costs of each batch of a sweep; ``loaded``: residents that are loaded already (None: all)."""
        missing = self._missing_share(placement, batches, first=first)
        costs = []
        for batch in batches:
            visited = [
                layer for name in batch.layers if self._visits(layer := self.layers[name], forward)
            ]
            if not visited:
                continue
            there = not batch.streamed and (loaded is None or batch.index in loaded)
            costs.append(
                self._batch(placement, batch, visited, forward, there=there, missing=missing)
            )
        return costs

    def _visits(self, layer: PlannedLayer, forward: PassShape | None) -> bool:
        return forward is None or self.work is None or self.work.visits(layer, forward)

    def _batch(
        self,
        placement: Placement,
        batch: LayerBatch,
        layers: Sequence[PlannedLayer],
        forward: PassShape | None,
        *,
        there: bool,
        missing: float,
    ) -> BatchCost:
        read, processor = (0.0, 0.0) if there else self._read(placement, batch, missing)
        compute = 0.0
        if forward is not None and self.work is not None:
            compute = sum(
                self.work.seconds(layer, forward, mapped=placement.maps) for layer in layers
            )
        copied = 0 if there and batch.device_resident else batch.copied_bytes
        link = self.rates.host_copy if placement.on_cpu else self.rates.h2d
        if layers[0].kind is LayerKind.BLOCK:
            # Both ways, in the thread that computes, which waits for it.
            cache = 2 * placement.kv_bytes_per_block * len(layers)
            compute += cache / self.rates.pageable_h2d
        slot = not placement.maps and not there and not batch.host_resident
        return BatchCost(
            read_seconds=read,
            copy_seconds=copied / link,
            # On a CPU, reading takes processor time from the computation.
            compute_seconds=compute + (processor if placement.on_cpu and compute else 0.0),
            host_bytes=batch.host_bytes if slot else 0,
            device_bytes=0 if batch.device_resident else batch.device_bytes,
            copied_away=not batch.uses_host_image,
        )

    def _read(self, placement: Placement, batch: LayerBatch, missing: float) -> tuple[float, float]:
        """Seconds to read ``batch``, and processor seconds for that."""
        rates, nbytes = self.rates, batch.read_bytes
        if placement.reader is not ReaderKind.MMAP:
            throttle = self.throttle_bytes_per_second or math.inf
            seconds = nbytes / min(rates.disk, throttle)
            return seconds, nbytes * rates.direct_cpu_seconds_per_byte
        seconds = missing * nbytes / rates.mmap
        processor = missing * nbytes * rates.mmap_cpu_seconds_per_byte
        if not placement.on_cpu:  # copied from the mapping into a slot
            seconds += nbytes / rates.host_copy
        return seconds, processor

    def _missing_share(
        self, placement: Placement, batches: Sequence[LayerBatch], *, first: bool
    ) -> float:
        """The share of reads through the page cache that miss it."""
        if placement.reader is not ReaderKind.MMAP:
            return 1.0
        wanted = sum(b.read_bytes for b in batches if first or b.streamed)
        if first:
            return max(0.0, 1 - self.cached_bytes / wanted) if wanted else 0.0
        # Cyclic reads through a cache that is too small never hit.
        return 0.0 if wanted <= placement.page_room_bytes else 1.0
