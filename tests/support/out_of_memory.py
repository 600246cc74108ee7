"""Devices without memory in mid-run, and models on the stand-in for a GPU that this happens to."""

import json
import threading

import torch

from layerstream.pipeline import Budget, StreamedModel, Workload

__all__ = ["OutOfMemory", "opened"]


class OutOfMemory:
    """Makes an operation raise what torch raises: at its call number ``at``, counted from 0, and so many times."""

    def __init__(self, monkeypatch, owner, name, *, at, times=1):
        self.calls = self.raised = 0
        works, counting = getattr(owner, name), threading.Lock()

        def call(*args, **named):
            with counting:
                self.calls += 1
                self.raised += (fails := self.calls > at and self.raised < times)
            if fails:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nM")
            return works(*args, **named)

        monkeypatch.setattr(owner, name, call)


async def opened(folder, *, layers=2, host=None, **options):
    """A model of which about so many layers are resident in VRAM."""
    await _warm_up(folder)
    options = {
        "device": "cuda:0",
        "layer_batch_size": 1,
        "slots": 2,
        "workload": Workload(prompt_tokens=8, new_tokens=8),
        "measure": False,
    } | options
    async with StreamedModel.open(folder, **options) as model:
        plan = model.plan
    largest = max(batch.device_bytes for batch in plan.batches)
    vram = plan.device_memory.reserved_bytes + (2 << 20) + layers * largest
    host = host or plan.host_memory.reserved_bytes + 3 * max(b.host_bytes for b in plan.batches)
    return StreamedModel.open(folder, budget=Budget(vram=vram, host=host), **options)


async def _warm_up(folder):
    """Run the first model of its kind in the process, so that code that is loaded only once is in no later one's budget."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    for _ in range(0 if kind in _warm else 2):
        async with StreamedModel.open(folder, device="cpu", measure=False) as model:
            await model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
    _warm.add(kind)


_warm = set()
