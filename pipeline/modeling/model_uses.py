"""When a model uses which weight, and in how much memory: without adapters, and with them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.modeling.activation_memory import PromptPass, measure_memory
from layerstream.pipeline.modeling.adapters import Adapters
from layerstream.pipeline.modeling.execution_trace import (
    ExecutionTrace,
    most_complete_first,
    trace_execution,
)
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.planning.plan import Workload
from layerstream.pipeline.planning.workload_memory import (
    WorkloadMemory,
    estimate_memory,
    has_sinks,
)

__all__ = ["trace_uses", "with_estimate"]


def trace_uses(
    traced: TracedModel,
    adapters: Adapters,
    workload: Workload | None,
    device: torch.device | None,
    *,
    mapped_from_bytes: int | None = None,
) -> tuple[Sequence[ExecutionTrace], WorkloadMemory | None]:
    """Traces of the model's passes, the most complete one first, and the memory that ``workload`` takes at most.

    The memory is None without a workload, or if it could not be measured. ``mapped_from_bytes``: see ``measure_memory``.
    """
    names = traced.recipes.keys() | traced.aliases.keys()
    traces: list[ExecutionTrace] = []
    memories: list[WorkloadMemory | None] = []
    for use in adapters.uses(traced.module):
        use()
        prompt_pass = None
        if workload is not None:
            prompt_pass = PromptPass.of(
                traced.module, workload, device, mapped_from_bytes=mapped_from_bytes
            )
        traces += trace_execution(traced.module, prompt_pass, names)
        memory = prompt_pass.memory() if prompt_pass else None
        if memory is None and prompt_pass and workload:
            # Some models refuse the parameters that record their uses.
            memory = measure_memory(
                traced.module, workload, device, mapped_from_bytes=mapped_from_bytes
            )
        memories.append(memory)
    adapters.activate(traced.module, adapters.default)
    measured = [each for each in memories if each is not None]
    memory = WorkloadMemory.largest(measured) if len(measured) == len(memories) else None
    return most_complete_first(traces), memory


def with_estimate(
    measured: WorkloadMemory | None,
    traced: TracedModel,
    checkpoint: Checkpoint,
    workload: Workload | None,
    *,
    own_buffer_bytes: int,
) -> WorkloadMemory | None:
    """The memory of ``workload``: what was measured, or else an estimate that holds for the model's attention.

    Args:
        measured: Of the workload; None if it could not be measured.
        traced: The model.
        checkpoint: Its weight files.
        workload: None for none, which takes no memory.
        own_buffer_bytes: Buffers that each request has of its own.
    """
    if workload is None:
        return None
    memory = measured or estimate_memory(
        checkpoint.config,
        workload,
        sinks=has_sinks(checkpoint.tensors),
        eager=getattr(traced.module.config, "_attn_implementation", None) == "eager",
    )
    return memory and replace(memory, own_buffer_bytes=workload.batch_size * own_buffer_bytes)
