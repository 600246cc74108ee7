"""The fault matrix: whatever happens at whichever stage, everything goes home and the caller hears why."""

import asyncio
import errno
import os
import random

import pytest
import torch
from support.checkpoints import CPU, GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.faults import Gate, RecordingReader, SteppedFakeDevice, Steps, failing_with
from support.leaks import mappings_of, nothing_left_behind, our_tasks, our_threads
from support.loop import happens, run, turns

from layerstream.pipeline import ClosedError, Pipeline, ReadError
from layerstream.stages.errors import DeviceError
from layerstream.stages.threads import Threads

BLOCKS = 6
BATCHES = BLOCKS + 2
AT = 4  # the step at which things happen: behind the first batches, before the sweep wraps around

STAGES = pytest.mark.parametrize("stage", ["read", "transfer", "compute"])


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    return tmp_path


class Rig:
    """A pipeline on the fake device, each of whose stages stops or fails where a test wants it."""

    def __init__(self, folder, *, slots=3):
        self.plan = arranged(plan_for(folder, GPU), slots=slots)
        self.reader = RecordingReader([file.path for file in self.plan.files])
        self.device = SteppedFakeDevice()
        self.computed = Steps()
        self.pipeline = Pipeline(self.plan, device=self.device, reader=self.reader)

    def before(self, stage, step, action):
        if stage == "read":
            self.reader.halfway(step, action)
        else:
            {"transfer": self.device.steps, "compute": self.computed}[stage].before(step, action)

    def compute(self, batch, state):
        self.computed.take()
        _ = batch.tensors
        self.device.launch(lambda: None)
        return state + 1

    def run(self):
        return self.pipeline.run(self.compute, 0)

    async def close(self):
        """Close, and look whether all went home."""
        await self.pipeline.aclose()
        host, device = self.pipeline._resources.arenas
        assert (host.used_slots, device.used_slots) == (0, 0)
        assert self.device.host_memories == 0
        assert our_threads() == []
        assert our_tasks() == []


async def exhaust(sweep):
    async for _ in sweep:
        pass


@STAGES
def test_when_a_stage_raises_the_caller_gets_that_error_itself_with_a_note_of_where(folder, stage):
    error = {"read": ReadError, "transfer": DeviceError, "compute": ValueError}[stage]("broken")

    async def main():
        rig = Rig(folder)
        rig.before(stage, AT, failing_with(error))
        await rig.pipeline.open()
        with pytest.raises(type(error)) as caught:
            await rig.run()
        assert caught.value is error
        (note,) = error.__notes__
        assert note.startswith(f"layerstream: in the {stage} stage, at layer batch {AT} ")
        if stage != "compute":  # the pipeline is over: every later sweep says why
            for _ in range(2):
                with pytest.raises(type(error)):
                    await rig.run()
        await rig.close()

    with nothing_left_behind():
        run(main())


@STAGES
def test_when_the_caller_is_cancelled_what_runs_is_finished_and_the_next_sweep_is_whole(
    folder, stage
):
    async def main():
        rig = Rig(folder)
        with Gate() as gate:
            rig.before(stage, AT, gate)
            await rig.pipeline.open()
            caller = asyncio.create_task(rig.run())
            await happens(gate.reached)
            caller.cancel()
            await turns()
            if stage == "compute":
                assert not caller.done()  # the computation at hand is finished first
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert await rig.run() == BATCHES
            await rig.close()

    with nothing_left_behind():
        run(main())


@STAGES
def test_when_the_consumer_leaves_the_next_sweep_is_whole(folder, stage):
    async def main():
        rig = Rig(folder)
        with Gate() as gate:
            if stage != "compute":
                rig.before(stage, AT, gate)
            await rig.pipeline.open()
            async for batch in rig.pipeline.sweep():
                if batch.index == 1:
                    break
            gate.open()
            assert await rig.run() == BATCHES
            await rig.close()

    with nothing_left_behind():
        run(main())


@STAGES
def test_closing_waits_for_the_thread_at_work_and_tells_the_caller(folder, stage):
    async def main():
        rig = Rig(folder)
        with Gate() as gate:
            rig.before(stage, AT, gate)
            await rig.pipeline.open()
            caller = asyncio.create_task(rig.run())
            await happens(gate.reached)
            closing = asyncio.create_task(rig.close())
            await turns()
            assert not closing.done()  # the thread still uses what would be freed
            gate.open()
            with pytest.raises(ClosedError):
                await caller
            await closing

    with nothing_left_behind():
        run(main())


@STAGES
def test_closing_finishes_though_it_is_cancelled_again_and_again(folder, stage):
    async def main():
        rig = Rig(folder)
        with Gate() as gate:
            rig.before(stage, AT, gate)
            await rig.pipeline.open()
            caller = asyncio.create_task(rig.run())
            await happens(gate.reached)
            closing = asyncio.create_task(rig.pipeline.aclose())
            for _ in range(5):
                await turns()
                closing.cancel()
            await turns()
            assert not closing.done()
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await closing
            with pytest.raises(ClosedError):
                await caller
            await rig.close()

    with nothing_left_behind():
        run(main())


def test_an_error_overtakes_the_batches_that_are_still_queued(folder):
    error = ReadError("broken")

    async def main():
        rig = Rig(folder, slots=6)
        rig.before("read", AT, failing_with(error))
        await rig.pipeline.open()
        sweep = rig.pipeline.sweep()
        assert (await anext(sweep)).index == 0
        await asyncio.wait([rig.pipeline._stages])  # it fails without anybody taking what is queued
        with pytest.raises(ReadError) as caught:
            await anext(sweep)
        assert caught.value is error
        await rig.close()

    with nothing_left_behind():
        run(main())


def test_an_error_does_not_wait_for_what_the_other_stage_has_begun(folder):
    error = ReadError("broken")

    async def main():
        rig = Rig(folder, slots=6)
        with Gate() as gate:
            rig.before("transfer", 2, gate)

            def fail_behind_the_gate():
                gate.reached.wait()
                raise error

            rig.before("read", AT, fail_behind_the_gate)
            await rig.pipeline.open()
            with pytest.raises(ReadError) as caught:
                await rig.run()
            assert caught.value is error
            assert not rig.pipeline._stages.done()  # a copy is still held up
            gate.open()
            await rig.close()

    with nothing_left_behind():
        run(main())


def test_a_pipeline_may_fail_before_anybody_asks(folder):
    async def main():
        rig = Rig(folder)
        rig.before("read", 0, failing_with(OSError(errno.EIO, "broken")))
        await rig.pipeline.open()
        await asyncio.wait([rig.pipeline._stages])
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                await anext(rig.pipeline.sweep())
        await rig.close()

    with nothing_left_behind():
        run(main())


def test_after_an_error_a_sweep_that_is_still_held_does_not_hide_it_from_the_next(folder):
    async def main():
        rig = Rig(folder)
        rig.before("read", 2, failing_with(ReadError("broken")))
        await rig.pipeline.open()
        first = rig.pipeline.sweep()
        with pytest.raises(ReadError):
            await exhaust(first)
        second = rig.pipeline.sweep()
        with pytest.raises(ReadError):
            await anext(second)
        await rig.close()

    run(main())


def test_memory_goes_back_though_somebody_keeps_the_error(folder):
    async def main():
        rig = Rig(folder)
        rig.before("transfer", AT, failing_with(DeviceError("broken")))
        await rig.pipeline.open()
        with pytest.raises(DeviceError) as caught:
            await rig.run()
        await rig.close()
        return caught.value, rig.pipeline

    kept = []
    with nothing_left_behind():
        kept.append(run(main()))


@pytest.mark.parametrize("reader", ["direct", "mmap", "throttled"])
@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
def test_a_file_that_shrinks_while_it_is_streamed_is_an_error_and_never_zeros(
    folder, reader, hardware
):
    write_checkpoint(folder, blocks=BLOCKS, rows=100)
    plan = arranged(plan_for(folder, hardware, reader=reader), slots=1)
    victim = plan.files[-1]  # too far off to have been read when the first batch arrives

    async def main():
        device = None if hardware is CPU else FakeDevice()
        async with Pipeline(plan, device=device) as pipeline:
            sweep = pipeline.sweep()
            assert (await anext(sweep)).index == 0
            os.truncate(victim.path, 4096)
            with pytest.raises(ReadError) as caught:
                await exhaust(sweep)
        return caught.value

    with nothing_left_behind():
        error = run(main())
        assert f"{victim.path}: holds 4096 bytes now" in str(error)
        assert f"in the read stage, at layer batch {BATCHES - 1}" in error.__notes__[0]
        del error
    assert mappings_of(folder) == []


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
def test_a_read_half_way_into_a_slot_when_it_is_dropped_never_lands_in_somebody_elses(
    folder, hardware
):
    expected = write_checkpoint(folder, blocks=BLOCKS, rows=100)
    plan = arranged(plan_for(folder, hardware), slots=3)

    async def main():
        reader = RecordingReader([file.path for file in plan.files])
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


@pytest.mark.parametrize("failing", ["device_memory", "host_memory"])
def test_memory_that_is_refused_leaves_nothing_behind_and_is_told(folder, failing):
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


# -- many times -----------------------------------------------------------------------------------


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
            assert [arena.used_slots for arena in pipeline._resources.arenas] == [0, 0]
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
                left = chance.randrange(BATCHES + 1)
                async for batch in pipeline.sweep():
                    if batch.index == left:
                        break
            assert [arena.used_slots for arena in pipeline._resources.arenas] == [0, 0]

    with nothing_left_behind():
        run(main())
    assert mappings_of(folder) == []


def test_a_call_that_no_thread_had_taken_up_when_the_pool_was_closed_says_so():
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
