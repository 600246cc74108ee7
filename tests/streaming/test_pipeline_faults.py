"""The fault matrix: an error, a cancellation or an early end at each stage frees everything and reaches the caller."""

import asyncio
import errno

import pytest
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.faults import Gate, RecordingReader, SteppedFakeDevice, Steps, failing_with
from support.leaks import nothing_left_behind, our_tasks, our_threads, used_slots
from support.loop import happens, run, turns

from layerstream.pipeline import ClosedError, Pipeline, ReadError
from layerstream.stages.errors import DeviceError

BLOCKS = 6
BATCHES = BLOCKS + 2
AT = 4  # the step at which things happen: behind the first batches, before the sweep wraps around

STAGES = pytest.mark.parametrize("stage", ["read", "transfer", "compute"])


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    return tmp_path


class SteppedPipeline:
    """A pipeline on the fake device, each of whose stages stops or fails at a chosen step."""

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
        """Close, and check that everything was freed."""
        await self.pipeline.aclose()
        host, device = self.pipeline._resources.arenas
        assert (used_slots(host), used_slots(device)) == (0, 0)
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
        stepped = SteppedPipeline(folder)
        stepped.before(stage, AT, failing_with(error))
        await stepped.pipeline.open()
        with pytest.raises(type(error)) as caught:
            await stepped.run()
        assert caught.value is error
        (note,) = error.__notes__
        assert note.startswith(f"layerstream: in the {stage} stage, at layer batch {AT} ")
        if stage != "compute":  # the pipeline has ended: every later sweep raises the error
            for _ in range(2):
                with pytest.raises(type(error)):
                    await stepped.run()
        await stepped.close()

    with nothing_left_behind():
        run(main())


@STAGES
def test_when_the_caller_is_cancelled_running_work_is_finished_and_the_next_sweep_is_whole(
    folder, stage
):
    async def main():
        stepped = SteppedPipeline(folder)
        with Gate() as gate:
            stepped.before(stage, AT, gate)
            await stepped.pipeline.open()
            caller = asyncio.create_task(stepped.run())
            await happens(gate.reached)
            caller.cancel()
            await turns()
            if stage == "compute":
                assert not caller.done()  # the computation at hand is finished first
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert await stepped.run() == BATCHES
            await stepped.close()

    with nothing_left_behind():
        run(main())


@STAGES
def test_when_the_consumer_leaves_the_next_sweep_is_whole(folder, stage):
    async def main():
        stepped = SteppedPipeline(folder)
        with Gate() as gate:
            if stage != "compute":
                stepped.before(stage, AT, gate)
            await stepped.pipeline.open()
            async for batch in stepped.pipeline.sweep():
                if batch.index == 1:
                    break
            gate.open()
            assert await stepped.run() == BATCHES
            await stepped.close()

    with nothing_left_behind():
        run(main())


@STAGES
def test_closing_waits_for_the_running_thread_and_fails_the_caller(folder, stage):
    async def main():
        stepped = SteppedPipeline(folder)
        with Gate() as gate:
            stepped.before(stage, AT, gate)
            await stepped.pipeline.open()
            caller = asyncio.create_task(stepped.run())
            await happens(gate.reached)
            closing = asyncio.create_task(stepped.close())
            await turns()
            assert not closing.done()  # the thread still uses what would be freed
            gate.open()
            with pytest.raises(ClosedError):
                await caller
            await closing

    with nothing_left_behind():
        run(main())


@STAGES
def test_closing_finishes_although_it_is_cancelled_repeatedly(folder, stage):
    async def main():
        stepped = SteppedPipeline(folder)
        with Gate() as gate:
            stepped.before(stage, AT, gate)
            await stepped.pipeline.open()
            caller = asyncio.create_task(stepped.run())
            await happens(gate.reached)
            closing = asyncio.create_task(stepped.pipeline.aclose())
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
            await stepped.close()

    with nothing_left_behind():
        run(main())


def test_an_error_overtakes_the_batches_that_are_still_queued(folder):
    error = ReadError("broken")

    async def main():
        stepped = SteppedPipeline(folder, slots=6)
        stepped.before("read", AT, failing_with(error))
        await stepped.pipeline.open()
        sweep = stepped.pipeline.sweep()
        assert (await anext(sweep)).index == 0
        await asyncio.wait([stepped.pipeline._stages])  # it fails although the queue is not emptied
        with pytest.raises(ReadError) as caught:
            await anext(sweep)
        assert caught.value is error
        await stepped.close()

    with nothing_left_behind():
        run(main())


def test_an_error_does_not_wait_for_the_other_stage(folder):
    error = ReadError("broken")

    async def main():
        stepped = SteppedPipeline(folder, slots=6)
        with Gate() as gate:
            stepped.before("transfer", 2, gate)

            def fail_behind_the_gate():
                gate.reached.wait()
                raise error

            stepped.before("read", AT, fail_behind_the_gate)
            await stepped.pipeline.open()
            with pytest.raises(ReadError) as caught:
                await stepped.run()
            assert caught.value is error
            assert not stepped.pipeline._stages.done()  # a copy is still held up
            gate.open()
            await stepped.close()

    with nothing_left_behind():
        run(main())


def test_a_pipeline_may_fail_before_the_first_sweep(folder):
    async def main():
        stepped = SteppedPipeline(folder)
        stepped.before("read", 0, failing_with(OSError(errno.EIO, "broken")))
        await stepped.pipeline.open()
        await asyncio.wait([stepped.pipeline._stages])
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                await anext(stepped.pipeline.sweep())
        await stepped.close()

    with nothing_left_behind():
        run(main())


def test_after_an_error_a_sweep_that_is_still_held_does_not_hide_it_from_the_next(folder):
    async def main():
        stepped = SteppedPipeline(folder)
        stepped.before("read", 2, failing_with(ReadError("broken")))
        await stepped.pipeline.open()
        first = stepped.pipeline.sweep()
        with pytest.raises(ReadError):
            await exhaust(first)
        second = stepped.pipeline.sweep()
        with pytest.raises(ReadError):
            await anext(second)
        await stepped.close()

    run(main())


def test_memory_is_freed_although_the_error_is_still_referenced(folder):
    async def main():
        stepped = SteppedPipeline(folder)
        stepped.before("transfer", AT, failing_with(DeviceError("broken")))
        await stepped.pipeline.open()
        with pytest.raises(DeviceError) as caught:
            await stepped.run()
        await stepped.close()
        return caught.value, stepped.pipeline

    references = []
    with nothing_left_behind():
        references.append(run(main()))
