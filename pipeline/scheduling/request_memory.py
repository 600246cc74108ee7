"""The memory for requests: one for all that they need, or two if KV caches are kept in host RAM."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from layerstream.pipeline.planning.overheads import overheads
from layerstream.pipeline.planning.plan import MemoryUse, Plan
from layerstream.stages.errors import AdmissionError
from layerstream.stages.text import format_bytes

__all__ = ["RequestMemory", "request_memory_of"]

# The least that requests get of each memory: a few KiB more or less are not worth a refusal.
_MINIMUM_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMemory:
    """What a request needs, or what there is for all requests together. Each memory is compared by itself."""

    shared_bytes: int = 0
    """In the memory that resident layers are in, too: activations, the overhead of libraries, and mostly KV caches."""
    cache_bytes: int = 0
    """In host RAM for KV caches alone, if the other is VRAM; 0 if it is one memory."""

    @property
    def nbytes(self) -> int:
        """Of both memories together."""
        return self.shared_bytes + self.cache_bytes

    @property
    def is_split(self) -> bool:
        """Whether KV caches have a memory of their own."""
        return self.cache_bytes > 0

    def plus(self, other: Self) -> Self:
        """The memory of both."""
        return replace(
            self,
            shared_bytes=self.shared_bytes + other.shared_bytes,
            cache_bytes=self.cache_bytes + other.cache_bytes,
        )

    def minus(self, other: Self) -> Self:
        """What is left without ``other``."""
        return replace(
            self,
            shared_bytes=self.shared_bytes - other.shared_bytes,
            cache_bytes=self.cache_bytes - other.cache_bytes,
        )

    def fits(self, available: Self) -> bool:
        """Whether neither part is larger than that of ``available``."""
        return (
            self.shared_bytes <= available.shared_bytes
            and self.cache_bytes <= available.cache_bytes
        )

    def without(self, nbytes: int) -> Self:
        """The same without ``nbytes`` that are no KV cache's."""
        return replace(self, shared_bytes=max(self.shared_bytes - nbytes, 1))

    def share_of(self, available: Self) -> int:
        """The larger one of the shares of either memory, in bytes of both: n such requests fit if n times this does."""
        if not available.is_split:
            return self.shared_bytes
        return max(
            -(-available.nbytes * self.cache_bytes // available.cache_bytes),
            -(-available.nbytes * self.shared_bytes // available.shared_bytes),
        )

    def refusal(self, what: str, available: Self) -> AdmissionError:
        """The error of a request that would not fit even if it were alone, which says in which memory."""
        need, have = self.shared_bytes, available.shared_bytes
        where = "memory for its KV cache and activations"
        if available.is_split:
            where = "VRAM for its activations and what else is there"
            if need <= have:
                where = "host RAM for its KV cache"
                need, have = self.cache_bytes, available.cache_bytes
        return AdmissionError(
            f"{what} needs {format_bytes(need)} of {where}, but there are {format_bytes(have)} for "
            "requests; open the model with a larger workload or budget, or ask for fewer tokens or sequences at a time"
        )


def request_memory_of(plan: Plan, module: Any, config: Mapping[str, Any] | None) -> RequestMemory:
    """The memory for requests: what the plan reserves for its workload, and what it leaves of the budgets."""
    host_bytes = _free_bytes(plan.host_memory) - plan.overhead_bytes
    if plan.device_memory is not None:
        free = _free_bytes(plan.device_memory)
        if not plan.kv_cache_on_host:
            return RequestMemory(shared_bytes=plan.workload_bytes + max(free, _MINIMUM_BYTES))
        other = plan.workload_bytes - plan.kv_cache_bytes + plan.kv_cache_device_bytes
        return RequestMemory(
            shared_bytes=max(other + max(free, 0), _MINIMUM_BYTES),
            cache_bytes=max(plan.kv_cache_bytes + max(host_bytes, 0), _MINIMUM_BYTES),
        )
    overhead = 0
    if (workload := plan.workload) is not None:
        modules = sum(1 for _ in module.modules())
        # For a forward pass, which has logits of all tokens, more buffers are packed than for a generation.
        rows = workload.prompt_tokens
        each = overheads(config, modules=modules, rows=rows, logits=rows).per_request_bytes
        overhead = workload.batch_size * each
    return RequestMemory(
        shared_bytes=overhead + plan.workload_bytes + max(host_bytes, _MINIMUM_BYTES)
    )


def _free_bytes(memory: MemoryUse) -> int:
    return memory.budget_bytes - memory.used_bytes
