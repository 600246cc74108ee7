"""A pipeline leaves nothing behind when opening fails, or after many sweeps, cancellations, opens and closes."""

import asyncio
import random
from dataclasses import replace

import pytest
from support.checkpoints import CPU, GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.faults import Gate
from support.leaks import mappings_of, nothing_left_behind, our_tasks, used_slots
from support.loop import happens, run, turns
from support.sweeping import recording_reader

from layerstream.pipeline import ClosedError, Pipeline
from layerstream.stages.errors import DeviceError
from layerstream.stages.threads import Threads

BLOCKS = 6
BATCHES = BLOCKS + 2


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    return tmp_path


@pytest.mark.parametrize("failing", ["device_memory", "host_memory"])
def test_opening_without_enough_memory_raises_and_leaves_nothing_behind(folder, failing):
    class Full(FakeDevice):
        def refuse(self, nbytes):
            raise DeviceError(f"no {nbytes} bytes")

    setattr(Full, failing, Full.refuse)

    async def main():
        for residents in ({}, {"on_device": (1,), "on_host": (2,)}):
            device = Full()
            pipeline = Pipeline(arranged(plan_for(folder, GPU), **residents), device=device)
            with pytest.raises(DeviceError):
                await pipeline.open()
            assert device.host_memories == 0

    with nothing_left_behind():
        run(main())


def test_a_reader_that_was_given_is_closed_when_the_device_is_not_there(folder):
    plan = replace(plan_for(folder, GPU), device="cuda:99")

    async def main():
        reader = recording_reader(plan)
        with pytest.raises(DeviceError):
            await Pipeline(plan, reader=reader).open()

    with nothing_left_behind():
        run(main())


def test_opening_that_is_cancelled_leaves_nothing_behind(folder):
    gate = Gate()

    class Slow(FakeDevice):
        def host_memory(self, nbytes):
            gate()
            return super().host_memory(nbytes)

    async def main():
        device = Slow()
        opening = asyncio.create_task(Pipeline(plan_for(folder, GPU), device=device).open())
        await happens(gate.reached)
        opening.cancel()
        await turns()
        assert not opening.done()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert device.host_memories == 0

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
def test_two_hundred_sweeps_and_fifty_cancellations_leave_nothing_behind(folder, hardware):
    plan = arranged(plan_for(folder, hardware), slots=2, on_device=(3,))
    chance = random.Random(7)

    async def main():
        device = None if hardware is CPU else FakeDevice()

        def compute(batch, state):
            _ = batch.tensors
            if device:
                device.finish()
            return state + 1

        async with Pipeline(plan, device=device) as pipeline:
            for number in range(200):
                if number % 4 == 0:
                    task = asyncio.create_task(pipeline.run(compute, 0))
                    await turns(chance.randrange(60))
                    task.cancel()
                    await asyncio.wait([task])
                assert await pipeline.run(compute, 0) == BATCHES
            await pipeline.aclose()
            assert [used_slots(arena) for arena in pipeline._resources.arenas] == [0, 0]
        assert our_tasks() == []

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("reader", ["direct", "mmap"])
def test_fifty_opens_and_closes_leave_nothing_behind(folder, reader):
    plan = arranged(plan_for(folder, CPU, reader=reader), slots=2, on_host=(3,))
    chance = random.Random(11)

    async def main():
        for _ in range(50):
            async with Pipeline(plan) as pipeline:
                last = chance.randrange(BATCHES + 1)
                async for batch in pipeline.sweep():
                    if batch.index == last:
                        break
            assert [used_slots(arena) for arena in pipeline._resources.arenas] == [0, 0]

    with nothing_left_behind():
        run(main())
    assert mappings_of(folder) == []


def test_a_call_that_has_not_begun_when_the_pool_is_closed_raises():
    async def main():
        threads = Threads("test", 1)
        with Gate() as gate:
            first = asyncio.create_task(threads.run(gate))
            await happens(gate.reached)
            second = asyncio.create_task(threads.run(int))
            await turns()
            closing = asyncio.create_task(asyncio.to_thread(threads.close))
            with pytest.raises(ClosedError, match="the pipeline was closed"):
                await second
            gate.open()
            await first
            await closing

    with nothing_left_behind():
        run(main())
