"""On a GPU, no slot is written while it is read, and a device survives failures: ``pytest -m cuda``, or a stand-in.

Needs pytest and what the library needs, nothing else.
"""

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.gpu_models import SMALL
from support.gpus import SECONDS, StandIn, all_correct, keep, needs_cuda, poison_returned_host_slots
from support.leaks import nothing_left_behind
from support.loop import run
from support.models import save_model

from layerstream.pipeline import DeviceError, Pipeline, StreamedModel, options, starting


def stream_past_slow_kernels(gpu, device, folder, monkeypatch, *, stream=None, sweeps=2):
    """Stream a checkpoint through two slots past slow kernels; returns what they saw, and what is in the file."""
    expected = write_checkpoint(folder, blocks=8)
    plan = arranged(plan_for(folder, GPU), slots=2)
    poison_returned_host_slots(monkeypatch)

    async def main():
        seen = {}
        async with Pipeline(plan, device=device) as pipeline:
            try:
                for _ in range(sweeps):
                    async for batch in pipeline.sweep():
                        with device.computing_on(stream or device.stream()):
                            tensors = batch.tensors
                            gpu.launch(device, lambda tensors=tensors: keep(seen, tensors))
                            if getattr(device, "holds_copies", False):
                                device.finish()
                                device.release_copies()
                if stream is not None:
                    await asyncio.to_thread(device.record(stream).synchronize)
            finally:
                gpu.finish(device)
        return seen

    return run(main(), seconds=SECONDS), expected


def test_no_slot_is_written_while_it_is_read_by_slow_kernels_or_late_copies(
    gpu, tmp_path, monkeypatch
):
    assert all_correct(*stream_past_slow_kernels(gpu, gpu.device(gpu.slow), tmp_path, monkeypatch))


@pytest.mark.parametrize("kind", ["unawaited_copies", "unawaited_kernels"])
def test_a_missing_wait_would_be_seen(gpu, kind, tmp_path, monkeypatch):
    device = gpu.device(getattr(gpu, kind))
    assert not all_correct(*stream_past_slow_kernels(gpu, device, tmp_path, monkeypatch))


def test_computation_may_run_on_a_stream_of_the_callers(gpu, tmp_path, monkeypatch):
    device = gpu.device(gpu.slow)
    stream = gpu.new_stream(device)
    assert all_correct(*stream_past_slow_kernels(gpu, device, tmp_path, monkeypatch, stream=stream))


def test_two_pipelines_share_one_gpu(gpu, tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    expected = [write_checkpoint(folder, blocks=4 + i) for i, folder in enumerate(folders)]

    async def stream(folder, device):
        seen = {}
        async with Pipeline(arranged(plan_for(folder, GPU)), device=device) as pipeline:
            for _ in range(5):
                async for batch in pipeline.sweep():
                    tensors = batch.tensors
                    gpu.launch(device, lambda tensors=tensors: keep(seen, tensors))
            gpu.finish(device)
        return seen

    async def main():
        return await asyncio.gather(*(stream(folder, gpu.device()) for folder in folders))

    assert all(map(all_correct, run(main(), seconds=SECONDS), expected))


@pytest.mark.parametrize("opened", ["pipeline", "model"])
def test_memory_that_was_taken_from_a_device_is_returned_to_the_system(
    monkeypatch, tmp_path, opened
):
    device = StandIn(monkeypatch).opened
    memories_left = []
    monkeypatch.setattr(device, "trim", lambda: memories_left.append(device.host_memories))

    async def main():
        if opened == "pipeline":
            write_checkpoint(tmp_path, blocks=4)
            async with Pipeline(arranged(plan_for(tmp_path, GPU)), device=device):
                memories_left.clear()  # of trims while it was opened
                return
        folder = save_model(tmp_path / "model", "llama")
        async with StreamedModel.open(folder, device="cuda:0", workload=SMALL):
            memories_left.clear()
            return

    run(main(), seconds=SECONDS)
    assert memories_left == [0]  # once, and after everything else


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
def test_no_device_is_opened_on_the_event_loop_which_it_would_block_for_seconds(
    monkeypatch, tmp_path, name
):
    folder = save_model(tmp_path / "model", "llama")
    if name == "cuda:0":
        StandIn(monkeypatch)
    threads = []

    def recording(open_device):
        def open_and_record(device):
            threads.append(threading.get_ident())
            return open_device(device)

        return open_and_record

    for module in (options, starting):
        monkeypatch.setattr(module, "open_device", recording(module.open_device))

    async def main():
        async with StreamedModel.open(folder, device=name, workload=SMALL, measure=False):
            return threading.get_ident()

    assert run(main(), seconds=SECONDS) not in threads
    assert len(threads) > 1


def test_a_gpu_without_enough_memory_is_refused_and_the_next_pipeline_runs(gpu, tmp_path):
    expected = write_checkpoint(tmp_path, blocks=4)
    plan = arranged(plan_for(tmp_path, GPU))
    device = gpu.device()

    async def main():
        with pytest.raises(DeviceError, match=r"\d+ .*bytes"):
            async with Pipeline(replace(plan, device_arena_bytes=1 << 50), device=device):
                pass
        seen = {}
        async with Pipeline(plan, device=device) as pipeline:
            async for batch in pipeline.sweep():
                tensors = batch.tensors
                gpu.launch(device, lambda tensors=tensors: keep(seen, tensors))
            gpu.finish(device)
        return seen

    with nothing_left_behind_but_cuda(gpu):
        seen = run(main(), seconds=SECONDS)
    assert all_correct(seen, expected)


@contextmanager
def nothing_left_behind_but_cuda(gpu):
    """On a GPU the driver opens descriptors at any time: then only threads count."""
    if isinstance(gpu, StandIn):
        with nothing_left_behind():
            yield
        return
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("layerstream")] == []


@pytest.mark.cuda
@needs_cuda
def test_a_computation_that_runs_out_of_memory_raises_and_the_next_one_runs(tmp_path):
    expected = write_checkpoint(tmp_path, blocks=4)

    def greedy(batch, state):
        _ = batch, state
        return torch.empty(1 << 50, dtype=torch.uint8, device="cuda:0")

    def keep_tensors(batch, state):
        keep(state, batch.tensors)
        return state

    async def main():
        async with Pipeline(arranged(plan_for(tmp_path, GPU))) as pipeline:
            with pytest.raises(torch.OutOfMemoryError):
                await pipeline.run(greedy, None)
            return await pipeline.run(keep_tensors, {})

    seen = run(main(), seconds=SECONDS)
    assert all_correct(seen, expected)
