"""What a request takes of the memory that a plan reserves for its workload."""

from typing import NamedTuple

from layerstream.pipeline.planning.model_shape import Config
from layerstream.pipeline.planning.plan import Workload
from layerstream.pipeline.planning.workload_memory import WASTE, WorkloadMemory, estimate_memory

__all__ = ["Parts", "ReservedShare"]


class Parts(NamedTuple):
    """Memory of a request or of several."""

    cache: int
    """Bytes of KV caches."""
    other: int
    """Bytes of activations and all else."""


class ReservedShare:
    """Estimates the KV cache and activations of requests, in proportion to what is reserved for the workload.

    Args:
        config: config.json; without one, nothing is known and nothing reserved.
        workload: The requests that memory is reserved for.
        sinks: Whether the model's attention has sinks.
        reserved: What is reserved for them; None: what the estimate says.
        measured: What ``reserved`` is made of, if it was measured.
    """

    def __init__(
        self,
        config: Config | None,
        *,
        workload: Workload,
        sinks: bool,
        reserved: Parts | None,
        measured: WorkloadMemory | None,
    ) -> None:
        self._config = config
        self._sinks = sinks
        self._rows = workload.batch_size
        self._reserved = estimated = self._estimated(workload)
        self._cache_scale = self._scale = self._alive_scale = 1.0
        if reserved is None or not sum(reserved):
            return
        if not estimated.cache:  # the config tells no sizes of it: requests take it with the rest
            reserved = Parts(0, sum(reserved))
        self._reserved = reserved
        self._cache_scale = reserved.cache / estimated.cache if estimated.cache else 0.0
        self._scale = self._alive_scale = _ratio(reserved.other, estimated.other)
        if measured is not None:
            alive_bytes = max(measured.prefill_bytes, measured.decode_bytes)
            self._alive_scale = _ratio(WASTE * alive_bytes, estimated.other)

    def of(self, workload: Workload) -> Parts:
        """What requests of ``workload`` take at most."""
        cache, other = self._estimated(workload)
        # The C library keeps nothing of large blocks, but all of those that smaller requests make. These never take more than
        # a row of what is reserved, so that as many requests as were declared run at once.
        row_bytes = self._reserved.other * workload.batch_size / self._rows
        most = max(self._scale * other, row_bytes)
        return Parts(
            int(self._cache_scale * cache),
            int(min(most, max(self._alive_scale, self._scale) * other)),
        )

    def _estimated(self, workload: Workload) -> Parts:
        memory = estimate_memory(self._config, workload, sinks=self._sinks)
        if memory is None:
            return Parts(0, 0)
        return Parts(memory.kv_bytes, memory.reserved_bytes - memory.kv_bytes)


def _ratio(reserved_bytes: int, estimated_bytes: int) -> float:
    return reserved_bytes / estimated_bytes if reserved_bytes and estimated_bytes else 1.0
