"""The fake device: as late as the recorded waits allow, or by the clock; and proof that it shows every missing wait."""

import itertools
import threading
import time
from functools import partial

import pytest
import torch
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.fake_device import POISON, FakeDevice, FakeEvent
from support.gpus import all_correct, keep, poison_returned_host_slots, random_host_memory
from support.loop import run

from layerstream.pipeline import Pipeline


def test_on_the_fake_device_nothing_happens_before_something_waits_for_it():
    device = FakeDevice()
    host, _ = random_host_memory(device, 16)
    target = device.device_memory(16)
    seen = []
    copied = device.copy([(target, host.tensor)], after=())
    device.launch(lambda: seen.append(bytes(target.numpy())))
    device.finish()  # a computation that did not wait for its copy
    assert seen == [bytes([POISON]) * 16]
    copied.synchronize()
    assert bytes(target.numpy()) == bytes(host.tensor.numpy())


def test_on_the_fake_device_a_held_copy_runs_for_a_kernel_but_not_for_a_waiting_thread():
    device = FakeDevice(hold_copies=True)
    host, expected = random_host_memory(device, 16)
    target = device.device_memory(16)
    copied = device.copy([(target, host.tensor)], after=())
    thread = threading.Thread(target=copied.synchronize)
    thread.start()
    assert bytes(target.numpy()) == bytes([POISON]) * 16
    device.wait(copied)
    device.finish()
    thread.join()
    assert torch.equal(target, expected)


def test_the_fake_device_refuses_to_free_host_memory_during_a_copy():
    device = FakeDevice()
    host, _ = random_host_memory(device, 16)
    device.copy([(device.device_memory(16), host.tensor)], after=())
    with pytest.raises(AssertionError, match="released during copies"):
        device.release_host_memory(host)


def test_by_the_clock_the_fake_device_takes_its_time_and_reports_it(clock):
    device = FakeDevice(clock=clock, copy_seconds=0.02)
    host, expected = random_host_memory(device, 16)
    target = device.device_memory(16)
    begun = device.copy((), after=())
    copied = device.copy([(target, host.tensor)], after=())
    assert device.passed_at(copied) is None
    device.wait(copied)
    device.launch(lambda: None, seconds=0.03)
    computed = device.record()
    assert device.passed_at(computed) is None
    computed.synchronize()
    times = [device.passed_at(event) for event in (begun, copied, computed)]
    copying, computing = (b - a for a, b in itertools.pairwise(times))
    # Longer by the readings of the clock between queueing one and the next.
    assert copying == pytest.approx(0.02, abs=1e-5)
    assert computing == pytest.approx(0.03, abs=1e-5)
    assert times[-1] <= time.perf_counter()
    assert torch.equal(target, expected)


class UnawaitedCopies(FakeDevice):
    """As if ``device.wait(copied)`` were missing in the compute stage."""

    def wait(self, event):
        pass


class UnawaitedKernels(FakeDevice):
    """As if ``after=slot.after`` were missing in the transfer stage."""

    def copy(self, copies, *, after):  # noqa: ARG002 - that it is not used is the point
        return super().copy(copies, after=())


class HostSlotReturnedEarly(FakeDevice):
    """As if the transfer stage gave the host slot back without ``copied.synchronize()``."""

    def copy(self, copies, *, after):
        event = super().copy(copies, after=after)
        return _UnawaitedEvent(self, event.stream) if copies else event


class _UnawaitedEvent(FakeEvent):
    def synchronize(self):
        pass


def sweep_past_late_kernels(folder, device, monkeypatch):
    """Stream a checkpoint past kernels that run late; returns what they saw, and what is in the file.

    If the device holds its copies, the kernels of the first batch run before any thread has seen a copy done; all
    others run when something depends on them, or after the last batch.
    """
    expected = write_checkpoint(folder, blocks=12)
    plan = arranged(plan_for(folder, GPU), slots=2)
    poison_returned_host_slots(monkeypatch)

    async def main():
        seen = {}
        async with Pipeline(plan, device=device) as pipeline:
            try:
                async for batch in pipeline.sweep():
                    for name, tensor in batch.tensors.items():
                        device.launch(partial(keep, seen, {name: tensor}))
                    if device.holds_copies:
                        device.finish()
                        device.release_copies()
                device.finish()
            finally:
                device.release_copies()
        return seen

    seen = run(main())
    assert seen.keys() == expected.keys()
    return seen, expected


def test_a_batch_in_computation_on_a_stream_of_the_callers_is_not_overwritten(tmp_path):
    expected = write_checkpoint(tmp_path, blocks=12)
    device = FakeDevice()
    stream = device.new_stream()

    async def main():
        seen = {}
        async with Pipeline(arranged(plan_for(tmp_path, GPU), slots=2), device=device) as pipeline:
            async for batch in pipeline.sweep():
                with device.computing_on(stream):  # and left again before the batch is given back
                    for name, tensor in batch.tensors.items():
                        device.launch(partial(keep, seen, {name: tensor}))
            device.record(stream).synchronize()
        return seen

    assert all_correct(run(main()), expected)


@pytest.mark.parametrize("hold_copies", [False, True])
def test_a_pipeline_that_waits_gives_every_kernel_the_right_bytes(
    tmp_path, monkeypatch, hold_copies
):
    assert all_correct(
        *sweep_past_late_kernels(tmp_path, FakeDevice(hold_copies=hold_copies), monkeypatch)
    )


@pytest.mark.parametrize(
    ("device_kind", "hold_copies"),
    [
        (UnawaitedCopies, True),
        (UnawaitedKernels, False),
        (HostSlotReturnedEarly, True),
    ],
)
def test_a_missing_wait_is_seen_on_the_fake_device(tmp_path, monkeypatch, device_kind, hold_copies):
    assert not all_correct(
        *sweep_past_late_kernels(tmp_path, device_kind(hold_copies=hold_copies), monkeypatch)
    )
