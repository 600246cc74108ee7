"""Models whose packed residents are kept unpacked: bits, memory, and the switch to another budget."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.checkpoints import CPU
from support.gguf_models import save_gguf_model
from support.loop import run
from support.quantized import save_quantised

from layerstream.pipeline import Budget, StreamedModel, Workload
from layerstream.pipeline.machine.measurement import UnpackingRate
from layerstream.pipeline.modeling.binding import Binding
from layerstream.pipeline.modeling.unpacked_once import KeptUnpacked
from layerstream.stages.errors import DeviceError

IDS = torch.tensor([[5, 9, 2]])
# So slow that the plan cannot but keep weights unpacked.
SLOW = dataclasses.replace(
    CPU,
    host_available_bytes=8 << 30,
    unpacking=tuple(
        UnpackingRate(encoding=name, bytes_per_second=1e5) for name in ("fp8", "int4", "Q8_0")
    ),
)
LONG = Workload(prompt_tokens=8, new_tokens=100)


def kept_bytes(bindings: Sequence[Binding]) -> int:
    """What is kept unpacked at the moment."""
    return sum(weight._memory.nbytes for each in bindings for weight in each.kept._weights.values())


def saved(folder: Path, form: str) -> Path:
    """A tiny model; in GGUF, some rows of Llama's are permuted."""
    if form != "Q8_0":
        return save_quantised(folder, "llama", form)
    path = folder / "model.gguf"
    save_gguf_model(path, "llama")
    return path


def planned_bytes(model: StreamedModel) -> int:
    return sum(batch.unpacked_bytes for batch in model.plan.batches)


@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.parametrize("form", ["fp8-blocks", "int4-groups", "Q8_0"])
def test_bits_are_those_of_packed_ones_from_sweep_to_sweep_and_across_replans(
    tmp_path: Path, form: str, reader: str
) -> None:
    folder = saved(tmp_path, form)

    async def main() -> None:
        async with StreamedModel.open(
            folder, hardware=SLOW, kernels="exact", reader=reader, workload=LONG
        ) as model:
            bindings = model._running.stream._bindings
            assert planned_bytes(model)
            first = (await model.forward(input_ids=IDS)).logits
            assert not kept_bytes(bindings)  # a first token does not wait for it
            for _ in range(2):
                assert torch.equal((await model.forward(input_ids=IDS)).logits, first)
                assert kept_bytes(bindings) == planned_bytes(model)
            small = model.plan.host_memory.used_bytes - planned_bytes(model)
            await model.replan(budget=Budget(host=small))
            assert not planned_bytes(model)
            assert not kept_bytes(bindings)
            assert torch.equal((await model.forward(input_ids=IDS)).logits, first)
            assert not kept_bytes(bindings)
            await model.replan(budget=Budget(host="4GiB"))
            assert torch.equal((await model.forward(input_ids=IDS)).logits, first)
            assert kept_bytes(bindings) == planned_bytes(model) > 0
        assert not kept_bytes(bindings)

    run(main())


def test_without_memory_for_it_a_weight_is_unpacked_in_every_sweep(monkeypatch, caplog) -> None:
    def refused(_nbytes: int) -> None:
        raise DeviceError("the system has no memory")

    monkeypatch.setattr("layerstream.pipeline.modeling.unpacked_once.HostMemory", refused)
    kept = KeptUnpacked(is_kept=True)
    for _ in range(2):
        kept.begin_sweep()
    assert kept.get("w", 64, lambda _: None) is None
    assert kept.get("w", 64, lambda _: None) is None
    assert caplog.text.count("w is unpacked in every sweep: the system has no memory") == 1
