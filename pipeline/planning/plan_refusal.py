"""Why no plan fits, in one sentence. Pure."""

from collections.abc import Sequence

from layerstream.pipeline.planning.placement import MemoryBytes, Placer
from layerstream.pipeline.planning.problem import Problem
from layerstream.stages.errors import PlanError
from layerstream.stages.text import format_bytes

__all__ = ["refusal"]


def refusal(
    problem: Problem, needs: Sequence[tuple[Placer, MemoryBytes]], *, fewest_experts: int
) -> PlanError:
    """The error if nothing fits, for the choices that need the least.

    Args:
        problem: What was to be planned.
        needs: For each way to place things, the least memory.
        fewest_experts: So many have to be in memory at once.
    """
    placer, need = min(needs, key=_missing_bytes)
    nbytes, name = max((layer.nbytes, layer.name) for layer in problem.layers)
    side, needed, have, reserved = (
        ("host", need.host, placer.host_budget_bytes, placer.host_reserved_bytes)
        if need.host > placer.host_usable_bytes
        else ("VRAM", need.vram, placer.vram_budget_bytes or 0, placer.vram_reserved_bytes)
    )
    expert_bytes = placer.expert_bytes if side == "host" else placer.device_expert_bytes
    experts = (
        f" and {fewest_experts} experts, which take {format_bytes(expert_bytes)} with their buffers"
        if expert_bytes
        else ""
    )
    free = ""
    if side == "host" and (usable := placer.host_usable_bytes) < have:
        free = f", of which {format_bytes(usable)} are free beside code loaded for the model,"
    size = problem.choices.layer_batch_size or 1
    unit = "layer" if size == 1 else f"layer batch of {size} blocks"
    smaller = ""
    if size > 1 and problem.running_once_bytes is not None:
        smaller = "open the model anew with smaller ones (running, it keeps its own), "
    elif size > 1:
        smaller = "choose a smaller layer_batch_size, "
    return PlanError(
        f"the {side} budget of {format_bytes(have)}{free} cannot hold one {unit} at a time{experts}: at least "
        f"{format_bytes(needed)} are needed (the largest layer, {name}, has {format_bytes(nbytes)}; "
        f"{format_bytes(reserved)} are reserved for the workload); raise the budget, {smaller}or ask for fewer tokens "
        "at a time",
        needed_bytes=needed,
    )


def _missing_bytes(needed: tuple[Placer, MemoryBytes]) -> tuple[int, int]:
    """The bytes by which the budgets are too small, and of equal ones, what is needed in total."""
    placer, need = needed
    vram = max(0, need.vram - (placer.vram_budget_bytes or 0))
    return vram + max(0, need.host - placer.host_usable_bytes), sum(need)
