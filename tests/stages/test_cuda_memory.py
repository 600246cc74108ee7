"""On a GPU, memory stays within its budget and is given back: ``pytest -m cuda``, or a stand-in.

Needs pytest and what the library needs, nothing else.
"""

from dataclasses import replace

import pytest
import torch
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.gpu_models import SMALL, open_streaming, reference, wide_model
from support.gpus import SECONDS, Cuda, StandIn, needs_cuda
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import inputs_for, save_model

from layerstream.pipeline import (
    AdmissionError,
    Budget,
    Pipeline,
    PlanError,
    StreamedModel,
    Workload,
    opening,
)
from layerstream.stages.devices.cuda import CudaDevice
from layerstream.stages.process.usage import anonymous_bytes


def test_vram_stays_within_the_budget(gpu, tmp_path):
    folder, ids = wide_model(tmp_path), inputs_for("llama")["input_ids"]

    async def main():
        prepared = await open_streaming(folder)
        # What the driver loads with a kernel's first launch is in no budget, so all kernels run once before.
        async with StreamedModel(prepared._options) as model:
            await model.generate(ids, max_new_tokens=4)
            budget = model.plan.device_memory.budget_bytes
            hardware = model.hardware  # nor is the memory of probing
        del model
        with gpu.peak() as peaks:
            async with await same_budget(folder, budget, prepared, hardware) as model:
                assert any(not batch.device_resident for batch in model.plan.batches)
                await model.generate(ids, max_new_tokens=4)
        return budget, peaks

    budget, peaks = run(main(), seconds=SECONDS)
    assert max(peaks) <= budget, (peaks, budget)


async def same_budget(folder, budget, prepared, hardware):
    host = prepared._options.budget.host
    return StreamedModel.open(
        folder,
        device="auto",
        workload=SMALL,
        layer_batch_size=1,
        budget=Budget(vram=budget, host=host),
        hardware=hardware,
    )


def test_a_kv_cache_that_vram_cannot_hold_lives_in_host_ram_and_changes_no_token(gpu, tmp_path):
    folder, ids = wide_model(tmp_path), inputs_for("llama")["input_ids"]
    model = reference(folder, "llama", torch.bfloat16, gpu)
    generation = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids.to(gpu.torch_device), **generation)
    del model
    large = Workload(batch_size=8, prompt_tokens=16, new_tokens=2032)
    cache = 2 * 8 * 1024 * 2 * 8 * 2048  # keys and values, layers, width, bytes, sequences, tokens
    options = {"device": "auto", "workload": large, "layer_batch_size": 1}

    async def main():
        async with StreamedModel.open(folder, **options) as large_budget:
            assert not large_budget.plan.kv_cache_on_host
            reserved = large_budget.plan.device_memory.reserved_bytes
            layer = max(batch.device_bytes for batch in large_budget.plan.batches)
            options["hardware"] = large_budget.hardware  # the memory of probing is in no budget
        budget = Budget(vram=reserved - cache // 4, host="1GiB")
        assert cache // 2 > 4 * layer  # so that it fits without the cache, and not with it
        with gpu.peak() as peaks:
            async with StreamedModel.open(folder, budget=budget, **options) as small_budget:
                assert small_budget.plan.kv_cache_on_host
                tokens = await small_budget.generate(ids, **generation)
                output = await small_budget.forward(input_ids=ids)
                alone = await small_budget.forward(input_ids=ids, use_cache=False)
                # It would fit in the two memories together.
                with pytest.raises(AdmissionError, match=r"24000 tokens needs .* of VRAM"):
                    await small_budget.forward(input_ids=torch.ones((1, 24000), dtype=torch.long))
        return tokens, output, alone, budget.vram, peaks

    tokens, output, alone, budget, peaks = run(main(), seconds=SECONDS)
    assert torch.equal(tokens, expected)
    assert {layer.keys.device.type for layer in output.past_key_values.layers} == {"cpu"}
    assert torch.equal(output.logits, alone.logits)
    assert max(peaks) <= budget, (peaks, budget)


@pytest.mark.parametrize("case", ["mamba", "t5"])
def test_a_cache_that_cannot_live_in_host_ram_is_refused_when_the_model_is_opened(
    monkeypatch, tmp_path, case
):
    StandIn(monkeypatch)
    folder = save_model(tmp_path / "model", case)
    make_plan = opening.plan_model

    def on_host(*args, **options):
        return replace(make_plan(*args, **options), kv_cache_on_host=True)

    monkeypatch.setattr(opening, "plan_model", on_host)

    async def main():
        with pytest.raises(PlanError, match="the VRAM budget cannot hold the KV cache"):
            async with StreamedModel.open(folder, device="cuda:0", workload=SMALL):
                pass

    with nothing_left_behind():
        run(main(), seconds=SECONDS)


@pytest.mark.cuda
@needs_cuda
def test_memory_that_cannot_be_page_locked_leaves_no_error_for_the_next_kernel():
    device = CudaDevice(torch.device("cuda:0"))
    memory = device.host_memory(1 << 20)
    try:
        # Registered a second time:
        error_text = device._call_runtime("cudaHostRegister", memory.address, 1 << 20, 0)
        assert "already" in error_text
        assert torch.ones(4, device="cuda:0").sum().item() == 4
    finally:  # memory that stays registered fails the next tests at this address
        device.release_host_memory(memory)
    assert torch.ones(4, device="cuda:0").sum().item() == 4


@pytest.mark.cuda
@needs_cuda
def test_closing_a_pipeline_unregisters_and_returns_all_host_memory(tmp_path, caplog):
    write_checkpoint(tmp_path, blocks=4)
    allocated = []

    class Recording(CudaDevice):
        def host_memory(self, nbytes):
            memory = super().host_memory(nbytes)
            allocated.append((memory.address, nbytes))
            return memory

    device = Recording(torch.device("cuda:0"))
    plan = arranged(plan_for(tmp_path, GPU), on_host=(1,))
    plan = replace(plan, host_arena_bytes=plan.host_arena_bytes + (256 << 20))

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            await pipeline.run(lambda _, state: state, None)

    run(main(), seconds=SECONDS)  # the driver's own tables grow the first time
    before, allocated[:] = anonymous_bytes(), []
    for _ in range(3):
        run(main(), seconds=SECONDS)
    assert len(allocated) == 6
    assert all(device._call_runtime("cudaHostUnregister", address) for address, _ in allocated)
    assert "cudaHostUnregister failed" not in caplog.text
    assert anonymous_bytes() - before < 64 << 20


def test_a_copy_may_lie_anywhere_in_a_large_registration(gpu):
    cuda = isinstance(gpu, Cuda)
    device = gpu.device()
    boundary = 1 << 30 if cuda else 1 << 20
    host = device.host_memory(boundary + (boundary >> 2))
    host.tensor.random_(0, 256)
    lengths = (1, 4096, 1 << 20, boundary // 2)
    for nbytes in lengths:
        start = boundary - nbytes // 2 - 1
        source = host.tensor[start : start + nbytes + 2]
        target = device.device_memory(source.numel())
        device.copy([(target, source)], after=()).synchronize()
        assert torch.equal(target.cpu(), source)
    del source
    device.release_host_memory(host)
