"""The memory for requests: one for all that they need, or two if KV caches are kept in host RAM."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from layerstream.pipeline.planning.overheads import overheads
from layerstream.pipeline.planning.plan import Plan
from layerstream.stages.errors import AdmissionError
from layerstream.stages.text import format_bytes

__all__ = ["Parts", "RequestMemory", "refusal", "request_memory_of"]

# The least that requests get of each memory: a few KiB more or less are not worth a refusal.
_MINIMUM_BYTES = 4 << 20


class Parts(NamedTuple):
    """What a request needs, in bytes."""

    cache: int
    """KV cache."""
    other: int
    """Activations, logits and the overhead of libraries."""

    def plus(self, other: int) -> Self:
        """The same with ``other`` more bytes that are no KV cache."""
        return self._replace(other=self.other + other)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMemory:
    """Memory for KV caches and activations of all requests together.

    Counted as one number even if it is two memories. A request then takes the larger one of its shares of either, so
    that neither memory is exhausted before the number is.
    """

    nbytes: int
    cache_bytes: int = 0
    """Of that, host RAM for KV caches alone, if the rest is VRAM; 0 if it is one memory."""

    @property
    def is_split(self) -> bool:
        """Whether KV caches have a memory of their own."""
        return self.cache_bytes > 0

    @property
    def shared_with_residents_bytes(self) -> int:
        """The part that is in the same memory as resident layers."""
        return self.nbytes - self.cache_bytes

    def taken_by(self, parts: Parts) -> int:
        """How many bytes of it a request takes."""
        if not self.is_split:
            return sum(parts)
        return max(
            -(-self.nbytes * parts.cache // self.cache_bytes),
            -(-self.nbytes * parts.other // self.shared_with_residents_bytes),
        )

    def without(self, nbytes: int) -> Self:
        """The same without ``nbytes`` that are no KV cache's."""
        return replace(self, nbytes=max(self.nbytes - nbytes, self.cache_bytes + 1))

    def refusal(self, what: str, parts: Parts) -> AdmissionError:
        """The error of a request that needs more than there is, which says of which memory."""
        if not self.is_split:
            return refusal(what=what, need_bytes=sum(parts), memory_bytes=self.nbytes)
        if parts.other > self.shared_with_residents_bytes:
            where = "VRAM for its activations and what else is there"
            need, available = parts.other, self.shared_with_residents_bytes
        else:
            where = "host RAM for its KV cache"
            need, available = parts.cache, self.cache_bytes
        return refusal(what=what, need_bytes=need, memory_bytes=available, where=where)


def refusal(
    *,
    what: str,
    need_bytes: int,
    memory_bytes: int,
    where: str = "memory for its KV cache and activations",
) -> AdmissionError:
    """The error of a request that would not fit even if it were alone."""
    return AdmissionError(
        f"{what} needs {format_bytes(need_bytes)} of {where}, but there are {format_bytes(memory_bytes)} for "
        "requests; open the model with a larger workload or budget, or ask for fewer tokens or sequences at a time"
    )


def request_memory_of(plan: Plan, module: Any, config: Mapping[str, Any] | None) -> RequestMemory:
    """The memory for requests: what the plan reserves for its workload, and what it leaves of the budget.

    With KV caches in host RAM only the former, which a new plan does not change: running requests have reserved shares
    of it, which would be shares of another total.
    """
    if plan.kv_cache_on_host:
        cache = max(plan.kv_cache_bytes, _MINIMUM_BYTES)
        other = max(plan.workload_bytes - plan.kv_cache_bytes, _MINIMUM_BYTES)
        return RequestMemory(nbytes=cache + other, cache_bytes=cache)
    overhead = 0
    if plan.device_memory is not None:
        free = plan.device_memory.budget_bytes - plan.device_memory.used_bytes
    else:
        free = plan.host_memory.budget_bytes - plan.host_memory.used_bytes - plan.overhead_bytes
        if (workload := plan.workload) is not None:
            modules = sum(1 for _ in module.modules())
            # For a forward pass, which has logits of all tokens, more buffers are packed than for a generation.
            rows = workload.prompt_tokens
            each = overheads(config, modules=modules, rows=rows, logits=rows).per_request_bytes
            overhead = workload.batch_size * each
    return RequestMemory(nbytes=overhead + plan.workload_bytes + max(free, _MINIMUM_BYTES))
