"""When a model uses which weight, and in how much memory: without adapters, and with them."""

from collections.abc import Sequence

import torch

from layerstream.pipeline.modeling.activation_memory import PromptPass
from layerstream.pipeline.modeling.adapters import Adapters
from layerstream.pipeline.modeling.execution_trace import (
    ExecutionTrace,
    most_complete_first,
    trace_execution,
)
from layerstream.pipeline.modeling.tracing import TracedModel
from layerstream.pipeline.planning.plan import Workload
from layerstream.pipeline.planning.workload_memory import WorkloadMemory

__all__ = ["trace_uses"]


def trace_uses(
    traced: TracedModel, adapters: Adapters, workload: Workload | None, device: torch.device | None
) -> tuple[Sequence[ExecutionTrace], WorkloadMemory | None]:
    """Traces of the model's passes, the most complete one first, and the memory that ``workload`` takes at most.

    The memory is None without a workload, or if it could not be measured.
    """
    names = traced.recipes.keys() | traced.aliases.keys()
    traces: list[ExecutionTrace] = []
    memories: list[WorkloadMemory | None] = []
    for use in adapters.uses(traced.module):
        use()
        prompt_pass = None if workload is None else PromptPass.of(traced.module, workload, device)
        traces += trace_execution(traced.module, prompt_pass, names)
        memories.append(prompt_pass.memory() if prompt_pass else None)
    adapters.activate(traced.module, adapters.default)
    measured = [each for each in memories if each is not None]
    memory = WorkloadMemory.largest(measured) if len(measured) == len(memories) else None
    return most_complete_first(traces), memory
