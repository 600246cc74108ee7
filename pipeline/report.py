"""Plans -> text. Timings tell of themselves: ``Timings.summary``."""

from layerstream.pipeline.plan import MemoryUse, Plan
from layerstream.stages.batch import LayerBatch
from layerstream.stages.units import format_bytes

__all__ = ["describe_plan"]


def describe_plan(plan: Plan) -> str:
    """The decision on one screen: what travels together, what stays where, in how much memory."""
    streamed = sum(batch.streamed for batch in plan.batches)
    size, requests = format_bytes(plan.first_sweep_bytes), format_bytes(plan.read_request_bytes)
    per_sweep, resident = format_bytes(plan.disk_bytes_per_sweep), len(plan.batches) - streamed
    letters = "".join(_letter(batch) for batch in plan.batches)
    lines = [
        f"{plan.checkpoint}: {size} in {len(plan.batches)} layer batches, on {plan.device}",
        f"layer batch size {plan.layer_batch_size}, {plan.host_slots} slots",
        f"reader {plan.reader}, {plan.reads_in_flight} requests of {requests} in flight",
        f"every sweep reads {per_sweep} in {streamed} batches; {resident} stay resident",
        f"map: {letters}  (. streamed, h in host RAM, d on the device)",
        _memory("host", plan.host_memory),
    ]
    if plan.device_memory is not None:
        lines.append(_memory("VRAM", plan.device_memory))
    lines.append(f"predicted {plan.predicted_sweep_seconds:.3f} s per sweep")
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _memory(side: str, memory: MemoryUse) -> str:
    return (
        f"{side} memory: {format_bytes(memory.used_bytes)} of a budget of "
        f"{format_bytes(memory.budget_bytes)} (slots {format_bytes(memory.arena_bytes)}, residents "
        f"{format_bytes(memory.resident_bytes)}, reserved {format_bytes(memory.reserved_bytes)})"
    )


def _letter(batch: LayerBatch) -> str:
    if batch.streamed:
        return "."
    return "d" if batch.device_resident and not batch.host_resident else "h"
