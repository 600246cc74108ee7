"""The pipeline on real checkpoints: every tensor of every batch, sweep after sweep, however it is left."""

import asyncio
import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import CPU, GPU, arranged, fused_layers, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.faults import RecordingReader
from support.loop import happens, run, turns

from layerstream.pipeline import (
    BusyError,
    Checkpoint,
    CheckpointError,
    ClosedError,
    Pipeline,
    PlanError,
)

BLOCKS = 6
BATCHES = BLOCKS + 2  # the embedding before the blocks, the head behind them


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a small checkpoint, and its tensors by name."""
    return tmp_path, write_checkpoint(tmp_path, blocks=BLOCKS)


def recording(plan):
    return RecordingReader([file.path for file in plan.files])


async def visited(sweep):
    return [batch.index async for batch in sweep]


def wrong_tensors(batch, expected):
    """Names of those tensors of ``batch`` that are not what the checkpoint holds."""
    return [
        name
        for name, tensor in batch.tensors.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]


RESIDENTS = {
    "all streamed": {},
    "one slot": {"slots": 1},
    "some in host RAM": {"on_host": (1, 4)},
    "some on the device": {"on_device": (0, 3, 5)},
    "some here, some there": {"on_host": (2, 6), "on_device": (4, 7), "slots": 2},
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


# -- what is read, and when -----------------------------------------------------------------------


def test_behind_a_finished_sweep_the_next_one_is_read_ahead_until_the_slots_are_full(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, CPU), slots=3)

    async def main():
        reader = recording(plan)
        async with Pipeline(plan, reader=reader) as pipeline:
            assert await visited(pipeline.sweep()) == list(range(BATCHES))
            await asyncio.to_thread(reader.steps.wait_for, BATCHES + 2)  # and nobody asked
            assert reader.log[:BATCHES] == list(range(BATCHES))
            assert await visited(pipeline.sweep()) == list(range(BATCHES))
            assert reader.log[: 2 * BATCHES] == [*range(BATCHES), *range(BATCHES)]

    run(main())


def test_a_pipeline_that_nobody_asks_reads_what_its_slots_hold_and_parks(tmp_path):
    write_checkpoint(tmp_path, blocks=BLOCKS, rows=2000)  # blocks of nearly equal size
    plan = arranged(plan_for(tmp_path, CPU), slots=3)

    async def main():
        reader = recording(plan)
        async with Pipeline(plan, reader=reader) as pipeline:
            arena, _ = pipeline._resources.arenas
            await asyncio.to_thread(reader.steps.wait_for, 3)
            while not arena._freed._waiters:  # until the read stage waits for room
                await turns(1)
            begun = reader.steps.count
            await turns(100)
            assert reader.steps.count == begun <= 4
            assert await visited(pipeline.sweep()) == list(range(BATCHES))
            assert reader.log[:BATCHES] == list(range(BATCHES))  # nothing was read twice

    run(main())


def test_residents_are_read_once(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, GPU), on_host=(1, 4), on_device=(0, 5))

    async def main():
        reader = recording(plan)
        async with Pipeline(plan, reader=reader, device=FakeDevice()) as pipeline:
            for _ in range(4):
                await visited(pipeline.sweep())
        counts = [reader.log.count(file) for file in range(BATCHES)]
        assert [counts[i] for i in (0, 1, 4, 5)] == [1, 1, 1, 1]
        assert all(counts[i] >= 4 for i in (2, 3, 6, 7))

    run(main())


def test_a_resident_that_was_dropped_on_its_way_is_loaded_by_a_later_sweep(checkpoint):
    folder, expected = checkpoint
    plan = arranged(plan_for(folder, GPU), on_device=range(0, BATCHES, 2), slots=2)
    device = FakeDevice()

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            for route in [(0,), (7, 6), (1,), (4, 4), None, (2, 0), None]:
                async for batch in pipeline.sweep(route):
                    views = batch.tensors
                    device.finish()
                    assert all(torch.equal(t, expected[n]) for n, t in views.items())
                    if batch.index == 6:
                        break

    run(main())


def test_a_resident_whose_copy_has_begun_is_not_loaded_again(checkpoint):
    folder, expected = checkpoint
    plan = arranged(plan_for(folder, GPU), on_device=(0,))
    device = FakeDevice(hold_copies=True)

    async def main():
        reader = recording(plan)
        async with Pipeline(plan, reader=reader, device=device) as pipeline:
            assert await visited(pipeline.sweep([0])) == [0]  # given back before its copy was done
            await turns()
            device.release_copies()
            async for batch in pipeline.sweep([0]):
                views = batch.tensors
                device.finish()
                assert all(torch.equal(t, expected[n]) for n, t in views.items())
        assert reader.log.count(0) == 1

    run(main())


def test_behind_a_sweep_that_was_left_early_the_first_batches_are_read_ahead(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, CPU))
    read_again = threading.Event()

    async def main():
        reader = recording(plan)
        async with Pipeline(plan, reader=reader) as pipeline:
            async for batch in pipeline.sweep():
                if batch.index == 4:
                    reader.halfway(0, read_again.set)
                    break
            await happens(read_again)  # and nobody asked

    run(main())


@pytest.mark.parametrize(
    "routes",
    [
        pytest.param([(1, 2, 3)] * 4, id="a part, again and again"),
        pytest.param([None, (5, 6, 7), None, (0,), None], id="changing"),
        pytest.param(
            [(7, 0, 3), (3, 0, 7), (0, 0, 1, 1)], id="in other orders, and twice in a row"
        ),
        pytest.param([(4,)] * 5, id="a single batch"),
    ],
)
@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_a_sweep_visits_its_route_in_order_and_nothing_else(checkpoint, routes, reader):
    folder, expected = checkpoint
    plan = arranged(plan_for(folder, CPU, reader=reader), slots=2, on_host=(0, 5))

    async def main():
        async with Pipeline(plan) as pipeline:
            for route in routes:
                seen = []
                async for batch in pipeline.sweep(route):
                    assert wrong_tensors(batch, expected) == []
                    seen.append(batch.index)
                assert seen == list(range(BATCHES) if route is None else route)

    run(main())


def test_batches_that_no_route_visits_are_not_read(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, CPU), slots=1)

    async def main():
        reader = recording(plan)
        async with Pipeline(plan, reader=reader) as pipeline:
            for _ in range(10):
                assert await visited(pipeline.sweep([2, 3])) == [2, 3]
        # What was read ahead before the first route was known is all that was read in vain.
        assert len([file for file in reader.log if file not in (2, 3)]) <= 3

    run(main())


@pytest.mark.parametrize("route", [(), (8,), (-1,), (0, 99)])
def test_a_route_outside_of_the_plan_is_refused(checkpoint, route):
    folder, _ = checkpoint

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            with pytest.raises(PlanError, match="does not lie within the plan's 8 batches"):
                pipeline.sweep(route)
            assert await visited(pipeline.sweep()) == list(range(BATCHES))

    run(main())


# -- leaving early --------------------------------------------------------------------------------


async def by_break(pipeline):
    async for batch in pipeline.sweep():
        if batch.index == 3:
            break


async def by_aclose(pipeline):
    sweep = pipeline.sweep()
    await anext(sweep)
    await sweep.aclose()
    await sweep.aclose()


async def by_context(pipeline):
    async with pipeline.sweep() as sweep:
        await anext(sweep)


async def by_exception(pipeline):
    async def divide():
        async for batch in pipeline.sweep():
            _ = 1 // (batch.index - 2)

    with pytest.raises(ZeroDivisionError):
        await divide()


async def by_cancellation(pipeline):
    received = asyncio.Event()

    async def consume():
        async for batch in pipeline.sweep():
            if batch.index == 2:
                received.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(consume())
    await received.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_never_beginning(pipeline):
    pipeline.sweep()


async def by_dropping_it_in_another_thread(pipeline):
    sweeps = [pipeline.sweep()]
    await anext(sweeps[0])
    await asyncio.to_thread(sweeps.clear)
    await turns()


async def by_a_cycle_that_only_the_collector_finds(pipeline):
    sweep = pipeline.sweep()
    await anext(sweep)
    sweep.cycle = sweep
    del sweep
    gc.collect()


@pytest.mark.parametrize(
    "leave",
    [
        by_break,
        by_aclose,
        by_context,
        by_exception,
        by_cancellation,
        by_never_beginning,
        by_dropping_it_in_another_thread,
        by_a_cycle_that_only_the_collector_finds,
    ],
)
@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
def test_after_a_sweep_that_was_left_early_the_next_one_is_whole(checkpoint, leave, hardware):
    folder, expected = checkpoint
    plan = arranged(plan_for(folder, hardware), slots=2)
    device = None if hardware is CPU else FakeDevice()

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            for _ in range(3):
                await leave(pipeline)
                seen = []
                async for batch in pipeline.sweep():
                    views = batch.tensors
                    if device:
                        device.finish()
                    assert all(torch.equal(t, expected[n]) for n, t in views.items())
                    seen.append(batch.index)
                assert seen == list(range(BATCHES))

    run(main())


def test_an_ended_sweep_gives_no_more_batches(checkpoint):
    folder, _ = checkpoint

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            sweep = pipeline.sweep()
            await sweep.aclose()
            with pytest.raises(ClosedError, match="has ended; ask the pipeline for a new one"):
                await anext(sweep)

    run(main())


def test_a_batch_that_was_given_back_gives_no_tensors(checkpoint):
    folder, _ = checkpoint

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            batches = [batch async for batch in pipeline.sweep()]
            with pytest.raises(ClosedError, match="layer batch 3 was given back"):
                _ = batches[3].tensors

    run(main())


def test_a_tensor_that_was_kept_can_still_be_touched_after_the_pipeline_was_closed(checkpoint):
    folder, _ = checkpoint

    async def main(reader):
        async with Pipeline(plan_for(folder, CPU, reader=reader)) as pipeline:
            return [tensor async for batch in pipeline.sweep() for tensor in batch.tensors.values()]

    for reader in ("direct", "mmap"):
        for tensor in run(main(reader)):
            tensor.sum()  # any bytes; but not a segmentation fault


# -- one sweep at a time, run(), and use at the wrong time ------------------------------------------


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


def test_before_it_is_opened_and_after_it_was_closed_a_pipeline_says_so(checkpoint):
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

    assert plan.files[2].path in (says := run(main()))
    assert "when the plan was made; plan anew" in says
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


def test_while_a_sweep_computes_the_event_loop_is_not_held(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, CPU), slots=2)
    late = []

    async def heartbeat():
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - due)

    def compute(batch, state):
        for tensor in batch.tensors.values():
            state += tensor.float().square().sum()
        return state

    async def main():
        beating = asyncio.create_task(heartbeat())
        async with Pipeline(plan) as pipeline:
            while len(late) < 200:
                await pipeline.run(compute, torch.zeros(()))
        beating.cancel()

    run(main())
    assert sorted(late)[len(late) * 99 // 100] < 0.05
