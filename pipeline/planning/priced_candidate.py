"""A candidate for a plan: a placement with its predicted times. Pure."""

import dataclasses
from dataclasses import dataclass

from layerstream.pipeline.planning.choices import LEAST_SLOTS
from layerstream.pipeline.planning.cost_model import Placement
from layerstream.pipeline.planning.placement import MemoryBytes, Placer
from layerstream.pipeline.planning.plan import MemoryUse, ReaderKind
from layerstream.pipeline.planning.prediction import Prediction

__all__ = ["PricedCandidate"]

_USUAL_SLOTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedCandidate:
    """A placement with its predicted times."""

    placer: Placer
    placement: Placement
    prediction: Prediction
    name: str = ""
    """What is special about it; empty for most."""

    @property
    def memory(self) -> tuple[MemoryUse, MemoryUse | None]:
        """Its use of the host budget and of the VRAM budget."""
        host, device = self.placer.memory(self.placement.batches, self.placement.arenas)
        if device is not None:
            device = dataclasses.replace(device, expert_bytes=self.placement.device_expert_bytes)
        return dataclasses.replace(host, expert_bytes=self.placement.expert_bytes), device

    @property
    def need(self) -> MemoryBytes:
        """The total bytes that it uses on each side."""
        host, device = self.memory
        return MemoryBytes(host.used_bytes, 0 if device is None else device.used_bytes)

    @property
    def leaves_code_free(self) -> bool:
        """Whether there is memory beside it for code of the model, which counts in the budget."""
        placer = self.placer
        return self.need.host + placer.overhead_bytes <= placer.host_usable_bytes

    @property
    def overlaps(self) -> bool:
        """Whether a batch can be read while another one is computed with."""
        return self.placement.maps or self.placement.slots > LEAST_SLOTS

    @property
    def preference(self) -> tuple[bool, int, bool, int, int, int]:
        """A sort key among equally fast candidates; the least is the best."""
        # The rest of a budget may be used: residents also help where the prediction is wrong, as with
        # a rate of computation that was measured while something else computed.
        slots = abs(self.placement.slots - _USUAL_SLOTS)
        mapped = self.placement.reader is ReaderKind.MMAP  # in memory that may be taken away
        # Mapped batches take no memory, so few large ones save hand-offs.
        hand_offs = len(self.placement.batches) if self.placement.maps else 0
        read_bytes = sum(batch.read_bytes for batch in self.placement.batches if batch.streamed)
        # Of one token; experts that stay are not read.
        read_bytes += sum(
            round(experts.missed_bytes(1))
            for found in self.placement.expert_sets.values()
            for experts in found
        )
        return bool(self.name), slots, mapped, hand_offs, read_bytes, sum(self.need)
