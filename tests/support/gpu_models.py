"""Models on a GPU or its stand-in: unstreamed references, streaming with the least memory, outputs compared by bits."""

import torch
import transformers

from layerstream.pipeline import Budget, PlanError, StreamedModel, Workload
from support.models import CASES, save_model

__all__ = ["SMALL", "equal_bits", "on", "open_streaming", "reference", "tensors_of", "wide_model"]

SMALL = Workload(prompt_tokens=16, new_tokens=16)


def reference(folder, case, dtype, gpu):
    """The model of ``folder`` on ``gpu``, not streamed."""
    kind = getattr(transformers, CASES[case].model)
    return kind.from_pretrained(folder, dtype=dtype).eval().to(gpu.torch_device)


def wide_model(folder):
    """A llama of 8 layers, 25 MB each: large compared with what allocators round up to."""
    return save_model(
        folder / "wide",
        "llama",
        torch.bfloat16,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


async def open_streaming(folder, **options):
    """The model with the smallest budgets that it opens with: whatever need not be resident streams."""
    options = {"device": "auto", "workload": SMALL, "layer_batch_size": 1, **options}
    async with StreamedModel.open(folder, **options) as model:
        plan = model.plan
    least_vram = plan.device_memory.reserved_bytes + _fewest_experts(
        plan, plan.device_memory, "device_cells", plan.shared_device_expert_cells
    )
    least_host = plan.host_memory.reserved_bytes + _fewest_experts(
        plan, plan.host_memory, "cells", plan.shared_expert_cells
    )
    for slots in range(
        3, 20
    ):  # layers that are always resident need memory in addition to three slots
        vram = least_vram + slots * max(b.device_bytes for b in plan.batches)
        host = least_host + slots * max(b.host_bytes for b in plan.batches)
        budget = Budget(vram=vram, host=host)
        try:
            async with StreamedModel.open(folder, budget=budget, **options):
                return StreamedModel.open(folder, budget=budget, **options)
        except PlanError:
            continue
    raise AssertionError("no budget suffices")


def _fewest_experts(plan, memory, name, shared):
    """Bytes of ``memory`` for two experts, and for what is there beside them."""
    largest = max((each.cell_bytes for each in plan.experts), default=0)
    cells = sum(getattr(each, name) * each.cell_bytes for each in plan.experts)
    return memory.expert_bytes - cells + (2 - shared) * largest


def on(device, inputs):
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def tensors_of(output):
    """All tensors in a model's output."""
    return [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(tuple(dict(output).values()))
        if isinstance(leaf, torch.Tensor)
    ]


def equal_bits(these, those):
    """Whether both lists hold tensors of equal bits, NaN included."""
    return len(these) == len(those) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(map(_at_least_1d, these), map(_at_least_1d, those), strict=True)
    )


def _at_least_1d(tensor):
    return tensor.reshape(1) if tensor.dim() == 0 else tensor
