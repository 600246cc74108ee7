"""A device that fails at any call: the caller learns of it, and closing frees everything, with a sweep held too."""

from contextlib import suppress
from functools import partialmethod

import pytest
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.faults import Steps
from support.leaks import nothing_left_behind, our_tasks
from support.loop import Interrupted, run
from support.models import inputs_for, save_model
from support.streaming import SMALL

from layerstream.pipeline import Pipeline, StreamedModel
from layerstream.stages.devices.cpu import CpuDevice
from layerstream.stages.errors import DeviceError

CALLS = [
    "host_memory",
    "device_memory",
    "copy",
    "record",
    "wait",
    "stream",
    "passed_at",
    "trim",
    "drain",
]


class FailingDevice(FakeDevice):
    """Fails at a chosen call of one method and, like a GPU whose kernel has faulted, at all later calls of it."""

    def __init__(self, method, at):
        super().__init__()
        self.steps, self.failed = Steps(), False
        works = getattr(self, method)

        def call(*args, **named):
            self.steps.take()
            if self.failed:
                raise DeviceError("the device has failed")
            return works(*args, **named)

        self.steps.before(at, self.fail)
        setattr(self, method, call)

    def fail(self):
        self.failed = True


def compute(batch, state):
    _ = batch.tensors
    return state + 1


def refuse(_stream=None):
    raise DeviceError("the device has failed")


async def hold_a_batch(pipeline):
    sweep = pipeline.sweep()
    held = await anext(sweep)
    _ = held.tensors
    return sweep


@pytest.mark.parametrize("method", CALLS)
def test_a_device_that_fails_at_any_call_does_not_keep_a_pipeline_from_being_closed(
    tmp_path, method
):
    write_checkpoint(tmp_path, blocks=2)
    plan = arranged(plan_for(tmp_path, GPU), slots=2, on_device=(1,), on_host=(2,))

    async def fails_at(number):
        """Use a pipeline whose device fails at call ``number``, and close it; whether there were so many calls."""
        device = FailingDevice(method, number)
        pipeline = Pipeline(plan, device=device)
        try:
            await pipeline.open()
            for _ in range(2):
                await pipeline.run(compute, 0)
            held = await hold_a_batch(pipeline)
            assert held
        except DeviceError:
            assert device.failed
        with suppress(DeviceError):  # it may say so once
            await pipeline.aclose()
        await pipeline.aclose()
        assert device.host_memories == 0
        assert our_tasks() == []
        return device.failed

    with nothing_left_behind():
        number = 0
        while run(fails_at(number)):
            number += 1
    assert number > 0


def test_after_a_device_failed_behind_a_computation_no_sweep_writes_into_its_slot(tmp_path):
    write_checkpoint(tmp_path, blocks=2)
    plan = arranged(plan_for(tmp_path, GPU), slots=2)

    async def main():
        device = FakeDevice()
        pipeline = Pipeline(plan, device=device)
        await pipeline.open()
        sweep = await hold_a_batch(pipeline)
        works, device.record = device.record, refuse
        with pytest.raises(DeviceError):
            await sweep.aclose()
        device.record = works
        with pytest.raises(DeviceError):
            await pipeline.run(compute, 0)
        await pipeline.aclose()

    with nothing_left_behind():
        run(main())


@pytest.mark.filterwarnings("ignore:module forward hook")  # torch warns of the second error
def test_a_device_that_fails_at_any_await_of_opening_a_model_leaves_nothing_behind(
    tmp_path, monkeypatch
):
    folder = save_model(tmp_path / "model", "t5")
    opens, works = StreamedModel._open, CpuDevice.record
    inputs = inputs_for("t5")

    async def fails_at(number):
        """Open a model whose device fails at await ``number``, use it, close it; whether there were so many awaits."""

        def record(device, stream=None):
            if opening.reached:
                refuse(stream)
            return works(device, stream)

        opening = Interrupted(opens, number, lambda: None)
        monkeypatch.setattr(StreamedModel, "_open", partialmethod(opening))
        monkeypatch.setattr(CpuDevice, "record", record)
        model = StreamedModel.open(folder, device="cpu", workload=SMALL, measure=False)
        try:
            async with model:
                await model.forward(**inputs)
        except DeviceError:
            assert opening.reached
        return opening.reached

    run(fails_at(10_000))  # what is loaded once for the process
    with nothing_left_behind():
        number = 0
        while run(fails_at(number)):
            number += 1
    assert number > 0
