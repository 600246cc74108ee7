"""Models opened with the least memory that they can stream in, and comparison of their outputs."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline import Budget, Plan, PlanError, StreamedModel, Workload

__all__ = ["SMALL", "bits_equal", "open_streaming", "smallest_streaming_budget", "tensors_of"]

SMALL = Workload(prompt_tokens=8, new_tokens=8)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a model's output."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_of(each)


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits: a NaN equals itself."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def smallest_streaming_budget(plan: Plan) -> Budget:
    """A budget for two slots, or for one if two would hold all: something has to stream."""
    image_bytes = {batch: batch.host_bytes + batch.device_bytes for batch in plan.batches}
    resident = sum(size for batch, size in image_bytes.items() if "shared" in batch.layers)
    sizes = [size for batch, size in image_bytes.items() if "shared" not in batch.layers]
    slots = 2 if sum(sizes) > 2 * max(sizes) else 1
    host = plan.host_memory.reserved_bytes + resident + slots * max(sizes)
    return Budget(host=host + _fewest_cells_bytes(plan))


def _fewest_cells_bytes(plan: Plan) -> int:
    """Bytes of the store with one cell for each layer and two for all, and its buffers."""
    sizes = [each.cell_bytes for each in plan.experts]
    largest = max(sizes, default=0)
    cells = sum(each.cells * each.cell_bytes for each in plan.experts)
    buffers = plan.host_memory.expert_bytes - cells - plan.shared_expert_cells * largest
    return buffers + sum(sizes) + 2 * largest


async def open_streaming(folder: Path, **options: Any) -> StreamedModel:
    """The model in ``folder`` with the least memory that it can stream in."""
    options = {"device": "cpu", "workload": SMALL, "layer_batch_size": 1, **options}
    key = _contents(folder), *((name, repr(value)) for name, value in sorted(options.items()))
    if (budget := _budgets.get(key)) is None or " at 0x" in str(key):
        async with StreamedModel.open(folder, budget=Budget(host="1GiB"), **options) as model:
            budget, has_experts = smallest_streaming_budget(model.plan), bool(model.plan.experts)
        if has_experts:
            budget = await _enough(folder, budget, options)
        _budgets[key] = budget
    return StreamedModel.open(folder, budget=budget, **options)


async def _enough(folder: Path, budget: Budget, options: dict[str, Any]) -> Budget:
    """``budget``, or what is needed if that is more: buffers of experts depend on how they are read."""
    try:
        async with StreamedModel.open(folder, budget=budget, **options):
            return budget
    except PlanError as error:
        return Budget(host=error.needed_bytes)


# Of models that were opened before, to see what they need: tests open equal ones again and again.
_budgets: dict[tuple[Any, ...], Budget] = {}


def _contents(path: Path) -> str:
    """A digest of a file, or of the files in a folder."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    digest = hashlib.blake2b()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()
