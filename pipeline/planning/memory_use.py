"""What a plan uses of one side's budget. Plain data."""

from dataclasses import dataclass

__all__ = ["MemoryUse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What a plan uses of one side's budget, in bytes."""

    budget_bytes: int
    arena_bytes: int
    """The ring of slots."""
    resident_bytes: int
    """Resident layer batches."""
    reserved_bytes: int
    """KV cache, activations and scratch of the workload, and what libraries take for its requests."""
    expert_bytes: int = 0
    """Cells of experts that are read on demand, and the buffers that they are read into."""
    adapter_bytes: int = 0
    """Weights of adapters, which are resident."""

    @property
    def taken_bytes(self) -> int:
        """The memory that a running pipeline takes even without requests."""
        return self.arena_bytes + self.resident_bytes + self.expert_bytes + self.adapter_bytes

    @property
    def used_bytes(self) -> int:
        """The total."""
        return self.taken_bytes + self.reserved_bytes
