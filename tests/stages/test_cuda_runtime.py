"""``CudaDevice`` itself, on a fake runtime: devices and streams of threads, page-locking, sticky errors.

The conformance suite of all devices runs on it, too, in test_devices.py.
"""

import threading

import pytest
import torch
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.fake_cuda import FakeCuda, RunningCudaDevice
from support.fake_device import POISON
from support.loop import run

from layerstream.pipeline import Pipeline
from layerstream.stages.devices.cuda import CudaDevice
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.errors import DeviceError


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    return FakeCuda().install(monkeypatch)


class ComputesWithoutTheCopy(RunningCudaDevice):
    """As if the compute stage forgot to wait for copies."""

    def wait(self, event):
        pass


class CopiesOverComputation(RunningCudaDevice):
    """As if the transfer stage forgot to wait for the computation that reads the slot."""

    def copy(self, copies, *, after):  # noqa: ARG002 - that it is not used is the point
        return super().copy(copies, after=())


def streams_correctly(folder, device, *, sweeps=2):
    """Stream a checkpoint past kernels that run late; returns whether they saw the right bytes."""
    expected = write_checkpoint(folder, blocks=6)
    plan = arranged(plan_for(folder, GPU), slots=2, on_host=(2,), on_device=(4,))
    seen = []

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            try:
                for _ in range(sweeps):
                    async for batch in pipeline.sweep():
                        for name, tensor in batch.tensors.items():
                            device.launch(
                                lambda name=name, tensor=tensor: seen.append((name, tensor.clone()))
                            )
                        # The first kernels run before any thread has seen a copy done.
                        if device.holds_copies:
                            device.finish()
                            device.release_copies()
                device.finish()
            finally:
                device.release_copies()

    run(main())
    assert len(seen) == sweeps * len(expected)
    return all(torch.equal(tensor, expected[name]) for name, tensor in seen)


@pytest.mark.parametrize("hold_copies", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_pipeline_streams_to_a_device_whether_or_not_it_is_current(
    runtime, tmp_path, index, hold_copies
):
    assert streams_correctly(tmp_path, RunningCudaDevice(index, hold_copies=hold_copies))
    assert runtime.pageable_copies == 0
    assert runtime.registered == {}
    assert runtime.device == 0  # of this thread, which is the event loop's


@pytest.mark.parametrize(
    ("kind", "hold_copies"), [(ComputesWithoutTheCopy, True), (CopiesOverComputation, False)]
)
def test_a_missing_wait_is_seen(tmp_path, kind, hold_copies):
    assert not streams_correctly(tmp_path, kind(hold_copies=hold_copies))


def test_a_copy_is_put_on_its_own_stream_and_done_later(runtime):
    device = RunningCudaDevice()
    host, target = device.host_memory(16), device.device_memory(16)
    host.tensor.fill_(7)
    seen = []
    copied = device.copy([(target, host.tensor)], after=())
    device.launch(lambda: seen.append(target.clone()))
    runtime.defaults[1].synchronize()
    assert bytes(seen[0].numpy()) == bytes([POISON]) * 16
    copied.synchronize()
    assert bytes(target.cpu().numpy()) == bytes([7]) * 16
    device.release_host_memory(host)


def test_copies_have_a_stream_of_their_own_of_high_priority(runtime):
    first, second = RunningCudaDevice(), RunningCudaDevice()
    assert first._stream is not second._stream
    assert first._stream not in runtime.defaults
    assert first._stream.priority < 0


def test_host_memory_is_page_locked_in_one_piece_for_its_device(runtime):
    device = RunningCudaDevice()
    memory = device.host_memory(3 << 20)
    assert runtime.registered == {memory.address: (3 << 20, 1)}
    assert runtime.device == 0
    device.release_host_memory(memory)
    assert runtime.registered == {}


def test_memory_that_cannot_be_page_locked_is_refused_and_fails_no_later_kernel(
    runtime, monkeypatch
):
    device = RunningCudaDevice()
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *_: runtime.fail(2))
    with pytest.raises(DeviceError, match=r"refused to page-lock 4096 bytes .* \(ulimit -l\)"):
        device.host_memory(4096)
    device.device_memory(1).fill_(0)  # raises no earlier error


def test_unregistering_memory_that_is_not_registered_is_logged_and_fails_no_later_kernel(
    runtime, caplog
):
    device = RunningCudaDevice()
    memory = device.host_memory(4096)
    runtime.registered.clear()
    device.release_host_memory(memory)
    assert "cudaHostUnregister failed: fake CUDA's text for error 713" in caplog.text
    device.device_memory(1).fill_(0)


def test_memory_of_the_allocator_that_a_kernel_still_uses_is_not_copied_to():
    device = RunningCudaDevice()
    order = []
    device.launch(lambda: order.append("kernel"))  # on the stream that the memory comes from
    target = device.device_memory(16)
    host = device.host_memory(16)
    device.copy([(target, host.tensor)], after=()).synchronize()
    assert order == ["kernel"]
    device.release_host_memory(host)


def test_each_thread_computes_on_its_own_current_stream(runtime):
    device = RunningCudaDevice()
    stream, seen = device.new_stream(), []

    def work():
        seen.append(device.stream())
        with device.computing_on(stream):
            seen.append((runtime.device, device.stream()))
        seen.append((runtime.device, device.stream()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    default = runtime.defaults[1]
    assert seen == [default, (1, stream), (0, default)]
    assert device.stream() is default


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_devices_are_opened_by_name(name, index):
    device = open_device(name)
    assert isinstance(device, CudaDevice)
    assert device.torch_device == torch.device("cuda", index)
    assert device.model_name() == f"fake GPU {index}"


def test_a_device_beyond_the_last_one_is_refused():
    with pytest.raises(DeviceError, match="this machine has 2; use cuda:0 to cuda:1"):
        open_device("cuda:2")


def test_a_device_that_has_failed_is_closed_without_raising_another_error(monkeypatch, caplog):
    device = RunningCudaDevice()
    memory = device.host_memory(4096)

    def faulted(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", faulted)
    monkeypatch.setattr(device._stream, "synchronize", faulted)
    device.drain()
    device.release_host_memory(memory)
    assert "cuda:1 has failed" in caplog.text
    assert memory.tensor.numel() == 0
