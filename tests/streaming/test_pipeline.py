"""The pipeline on real checkpoints: every tensor of every batch; one sweep at a time; use when it is not open."""

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import CPU, GPU, arranged, fused_layers, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.loop import run
from support.sweeping import visited, wrong_tensors

from layerstream.pipeline import BusyError, Checkpoint, CheckpointError, ClosedError, Pipeline

BLOCKS = 6
BATCHES = BLOCKS + 2  # the embedding before the blocks, the head behind them


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a small checkpoint, and its tensors by name."""
    return tmp_path, write_checkpoint(tmp_path, blocks=BLOCKS)


RESIDENTS = {
    "all streamed": {},
    "one slot": {"slots": 1},
    "some in host RAM": {"on_host": (1, 4)},
    "some on the device": {"on_device": (0, 3, 5)},
    "some on each": {"on_host": (2, 6), "on_device": (4, 7), "slots": 2},
    "everything in host RAM": {"on_host": range(BATCHES)},
    "everything on the device": {"on_device": range(BATCHES)},
}


@pytest.mark.parametrize("reader", ["direct", "mmap", "throttled"])
@pytest.mark.parametrize("residents", RESIDENTS.values(), ids=RESIDENTS)
def test_on_the_cpu_every_tensor_of_every_batch_is_exact(checkpoint, reader, residents):
    folder, expected = checkpoint
    plan = arranged(plan_for(folder, CPU, reader=reader), **residents)

    async def main():
        async with Pipeline(plan) as pipeline:
            for _ in range(5):
                seen = []
                async for batch in pipeline.sweep():
                    assert wrong_tensors(batch, expected) == []
                    seen += batch.tensors
                assert sorted(seen) == sorted(expected)

    run(main())


@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.parametrize("residents", RESIDENTS.values(), ids=RESIDENTS)
def test_on_a_device_every_kernel_sees_exact_tensors(checkpoint, reader, residents):
    folder, expected = checkpoint
    plan = arranged(plan_for(folder, GPU, reader=reader), **residents)
    device = FakeDevice()
    seen = []

    def compute(batch, state):
        for name, tensor in batch.tensors.items():
            device.launch(lambda name=name, tensor=tensor: seen.append((name, tensor.clone())))
        return state + 1

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            for _ in range(5):
                assert await pipeline.run(compute, 0) == BATCHES
            await pipeline.run(lambda _batch, _state: device.finish(), None)
        assert device.host_memories == 0

    run(main())
    assert len(seen) == 5 * len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in seen)


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
@pytest.mark.parametrize("residents", [{}, {"on_device": (0, 2)}, {"on_device": range(BLOCKS)}])
@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_tensors_fused_from_pieces_in_several_files_are_exact(
    checkpoint, hardware, residents, reader
):
    folder, tensors = checkpoint
    layers = fused_layers(Checkpoint.open(folder), blocks=BLOCKS)
    plan = arranged(plan_for(folder, hardware, reader=reader, layers=layers), **residents)
    device = None if hardware is CPU else FakeDevice()
    mlp = [tensors[f"model.layers.{i}.mlp.weight"] for i in range(BLOCKS)]

    def compute(batch, state):
        if device:
            _ = batch.tensors
            device.finish()
        for name, tensor in batch.tensors.items():
            i = batch.index
            fused = torch.cat([mlp[i], mlp[(i + 1) % BLOCKS]])
            assert torch.equal(tensor, fused if name.startswith("fused") else tensors[name])
            state += 1
        return state

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            for _ in range(4):
                assert await pipeline.run(compute, 0) == 2 * BLOCKS

    run(main())


def test_a_batch_of_empty_tensors_arrives_like_any_other(tmp_path):
    from safetensors.torch import save_file

    tensors = {"h.0.w": torch.ones(4, 4), "h.1.w": torch.empty(0, 4), "h.2.w": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")

    async def main(hardware, device, **residents):
        plan = arranged(plan_for(tmp_path, hardware), **residents)
        async with Pipeline(plan, device=device) as pipeline:
            for _ in range(2):
                async for batch in pipeline.sweep():
                    views = batch.tensors
                    if device:
                        device.finish()
                    for name, tensor in views.items():
                        assert torch.equal(tensor, tensors[name])

    run(main(CPU, None))
    run(main(GPU, FakeDevice()))
    run(main(GPU, FakeDevice(), on_device=[1]))
    run(main(GPU, FakeDevice(), on_host=[1]))


# -- one sweep at a time, run(), and use when it is not open ------------------------------------------


def test_a_second_sweep_at_the_same_time_is_refused_and_the_first_goes_on(checkpoint):
    folder, _ = checkpoint

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            sweep = pipeline.sweep()
            assert (await anext(sweep)).index == 0
            with pytest.raises(BusyError, match="a sweep is under way"):
                pipeline.sweep()
            with pytest.raises(BusyError):
                await pipeline.run(lambda _batch, state: state, None)
            assert await visited(sweep) == list(range(1, BATCHES))
            assert await visited(pipeline.sweep()) == list(range(BATCHES))

    run(main())


def test_run_folds_over_the_batches_in_one_thread_that_is_not_the_loops(checkpoint):
    folder, _ = checkpoint

    def compute(batch, state):
        return [*state, (batch.index, threading.current_thread().name)]

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            return await pipeline.run(compute, []), await pipeline.run(compute, [], route=[2, 5])

    whole, part = run(main())
    assert [index for index, _ in whole] == list(range(BATCHES))
    assert [index for index, _ in part] == [2, 5]
    (name,) = {name for _, name in whole + part}
    assert name.startswith("layerstream-compute")


def test_an_error_of_the_computation_leaves_run_as_itself_with_a_note_of_where(checkpoint):
    folder, _ = checkpoint
    error = KeyError("mine")

    def compute(batch, state):
        if batch.index == 4:
            raise error
        return state

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            with pytest.raises(KeyError) as caught:
                await pipeline.run(compute, None)
            assert caught.value is error
            assert error.__notes__ == [
                "layerstream: in the compute stage, at layer batch 4 (model.layers.3)"
            ]
            assert await visited(pipeline.sweep()) == list(range(BATCHES))

    run(main())


def test_tensors_made_under_inference_mode_can_be_used_where_gradients_are_wanted(checkpoint):
    folder, _ = checkpoint

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            with torch.inference_mode():
                async for batch in pipeline.sweep():
                    assert not any(tensor.is_inference() for tensor in batch.tensors.values())

    run(main())


def test_using_a_pipeline_before_it_is_open_or_after_it_is_closed_raises(checkpoint):
    folder, _ = checkpoint

    async def main():
        pipeline = Pipeline(plan_for(folder, CPU))
        with pytest.raises(ClosedError, match="not open"):
            pipeline.sweep()
        async with pipeline:
            await visited(pipeline.sweep())
        await pipeline.aclose()
        with pytest.raises(ClosedError, match="not open"):
            pipeline.sweep()
        with pytest.raises(ClosedError):
            await pipeline.run(lambda _batch, state: state, None)
        with pytest.raises(ClosedError, match="opened once"):
            await pipeline.open()

    run(main())


@pytest.mark.parametrize("reader", ["direct", "mmap", "throttled"])
def test_files_that_changed_since_the_plan_was_made_are_refused(checkpoint, reader):
    folder, _ = checkpoint
    plan = plan_for(folder, CPU, reader=reader)
    os.truncate(plan.files[2].path, plan.files[2].nbytes - 1)

    async def main():
        with pytest.raises(CheckpointError) as caught:
            await Pipeline(plan).open()
        return str(caught.value)

    assert plan.files[2].path in (message := run(main()))
    assert "when the plan was made; plan anew" in message
    Path(plan.files[2].path).unlink()
    assert "No such file" in run(main())


def test_timings_count_every_batch_and_byte(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, GPU))
    device = FakeDevice()

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            for _ in range(3):
                await visited(pipeline.sweep())
            device.drain()
            return pipeline.timings()

    timings = run(main())
    read, transfer, compute = timings.stages
    assert timings.sweeps == 3
    assert compute.items == 3 * BATCHES
    assert read.bytes >= 3 * plan.disk_bytes_per_sweep
    assert transfer.items >= compute.items - 1
    assert timings.wall_seconds > 0


def test_while_a_sweep_computes_the_event_loop_is_not_blocked(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, CPU), slots=2)
    delays = []

    async def heartbeat():
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            delays.append(time.perf_counter() - due)

    def compute(batch, state):
        for tensor in batch.tensors.values():
            state += tensor.float().square().sum()
        return state

    async def main():
        beating = asyncio.create_task(heartbeat())
        async with Pipeline(plan) as pipeline:
            while len(delays) < 200:
                await pipeline.run(compute, torch.zeros(()))
        beating.cancel()

    run(main())
    assert sorted(delays)[len(delays) * 99 // 100] < 0.05
