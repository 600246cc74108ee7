"""What the pipeline reads, and when: ahead, along a route, residents once; dropped reads."""

import asyncio
import threading

import pytest
import torch
from support.checkpoints import CPU, GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.faults import Gate
from support.loop import happens, run, turns
from support.sweeping import recording_reader, visited, wrong_tensors

from layerstream.pipeline import Pipeline, PlanError

BLOCKS = 6
BATCHES = BLOCKS + 2  # the embedding before the blocks, the head behind them


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a small checkpoint, and its tensors by name."""
    return tmp_path, write_checkpoint(tmp_path, blocks=BLOCKS)


def test_after_a_finished_sweep_the_next_one_is_read_ahead_until_the_slots_are_full(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, CPU), slots=3)

    async def main():
        reader = recording_reader(plan)
        async with Pipeline(plan, reader=reader) as pipeline:
            assert await visited(pipeline.sweep()) == list(range(BATCHES))
            await asyncio.to_thread(reader.steps.wait_for, BATCHES + 2)  # without another sweep
            # Reads that begin at once are logged in any order.
            assert sorted(reader.log[:BATCHES]) == list(range(BATCHES))
            assert await visited(pipeline.sweep()) == list(range(BATCHES))
            assert sorted(reader.log[: 2 * BATCHES]) == sorted([*range(BATCHES), *range(BATCHES)])

    run(main())


def test_a_pipeline_without_sweeps_reads_until_its_slots_are_full_and_waits(tmp_path):
    write_checkpoint(tmp_path, blocks=BLOCKS, rows=2000)  # blocks of nearly equal size
    plan = arranged(plan_for(tmp_path, CPU), slots=3)

    async def main():
        reader = recording_reader(plan)
        async with Pipeline(plan, reader=reader) as pipeline:
            arena, _ = pipeline._resources.arenas
            await asyncio.to_thread(reader.steps.wait_for, 3)
            while not arena._freed._waiters:  # until the read stage waits for a slot
                await turns(1)
            begun = reader.steps.count
            await turns(100)
            assert reader.steps.count == begun <= 4
            assert await visited(pipeline.sweep()) == list(range(BATCHES))
            assert sorted(reader.log[:BATCHES]) == list(range(BATCHES))  # nothing was read twice

    run(main())


def test_residents_are_read_once(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, GPU), on_host=(1, 4), on_device=(0, 5))

    async def main():
        reader = recording_reader(plan)
        async with Pipeline(plan, reader=reader, device=FakeDevice()) as pipeline:
            for _ in range(4):
                await visited(pipeline.sweep())
        counts = [reader.log.count(file) for file in range(BATCHES)]
        assert [counts[i] for i in (0, 1, 4, 5)] == [1, 1, 1, 1]
        assert all(counts[i] >= 4 for i in (2, 3, 6, 7))

    run(main())


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
@pytest.mark.parametrize("side", ["on_host", "on_device"])
def test_tensors_of_residents_are_made_once(checkpoint, hardware, side):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, hardware), slots=3, **{side: (1, 4)})

    async def main():
        device = None if hardware is CPU else FakeDevice()
        async with Pipeline(plan, device=device) as pipeline:
            sweeps = [
                {batch.index: dict(batch.tensors) async for batch in pipeline.sweep()}
                for _ in range(3)
            ]
            kept = [
                index
                for index, tensors in sweeps[0].items()
                if all(
                    each[index][name] is tensor
                    for each in sweeps
                    for name, tensor in tensors.items()
                )
            ]
            # Of residents in host memory, the images on the device stream.
            assert kept == ([1, 4] if hardware is CPU or side == "on_device" else [])

    run(main())


def test_a_resident_that_was_dropped_under_way_is_loaded_by_a_later_sweep(checkpoint):
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
        reader = recording_reader(plan)
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


def test_after_a_sweep_that_was_left_early_the_first_batches_are_read_ahead(checkpoint):
    folder, _ = checkpoint
    plan = arranged(plan_for(folder, CPU))
    read_again = threading.Event()

    async def main():
        reader = recording_reader(plan)
        async with Pipeline(plan, reader=reader) as pipeline:
            async for batch in pipeline.sweep():
                if batch.index == 4:
                    reader.halfway(0, read_again.set)
                    break
            await happens(read_again)  # without another sweep

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
        reader = recording_reader(plan)
        async with Pipeline(plan, reader=reader) as pipeline:
            for _ in range(10):
                assert await visited(pipeline.sweep([2, 3])) == [2, 3]
        # What was read ahead before the first route was known is all that was read unnecessarily.
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


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
def test_a_read_that_is_dropped_half_way_never_fills_the_slot_of_another_batch(tmp_path, hardware):
    expected = write_checkpoint(tmp_path, blocks=BLOCKS, rows=100)
    plan = arranged(plan_for(tmp_path, hardware), slots=3)

    async def main():
        reader = recording_reader(plan)
        device = None if hardware is CPU else FakeDevice()
        pipeline = Pipeline(plan, reader=reader, device=device)

        async def sweep(route):
            async for batch in pipeline.sweep(route):
                views = batch.tensors
                if device:
                    device.finish()
                assert all(torch.equal(t, expected[n]) for n, t in views.items())

        async with pipeline:
            with Gate() as three, Gate() as four:
                reader.halfway(3, three)
                reader.halfway(4, four)
                async for batch in pipeline.sweep():
                    if batch.index == 2:
                        await happens(three.reached)
                        await happens(four.reached)
                        break
                three.open()
                while is_under_way(pipeline, 3):
                    await turns(1)
                await turns()
                assert is_under_way(pipeline, 4)  # with its slot, which a thread still fills
                sweeping = asyncio.create_task(sweep([5, 6, 7, 1, 2]))
                await turns()
                four.open()
                await sweeping
                await sweep(None)

    run(main())


def is_under_way(pipeline, index):
    return any(item.batch.index == index for item in pipeline._route.under_way)
