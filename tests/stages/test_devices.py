"""One conformance suite for all devices, and devices by name."""

import itertools
import threading
import time

import pytest
import torch
from support.fake_cuda import FakeCuda, RunningCudaDevice
from support.fake_device import FakeDevice
from support.gpus import CLOCKS_APART_SECONDS, needs_cuda, random_host_memory

from layerstream.stages.devices.cpu import CpuDevice
from layerstream.stages.devices.cuda import CudaDevice
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.errors import DeviceError
from layerstream.stages.memory import HostMemory

DEVICES = [
    pytest.param(CpuDevice, id="cpu"),
    pytest.param(FakeDevice, id="fake"),
    pytest.param(RunningCudaDevice, id="cuda-on-a-fake-runtime"),
    pytest.param(
        lambda: CudaDevice(torch.device("cuda")), id="cuda", marks=[pytest.mark.cuda, needs_cuda]
    ),
]


@pytest.fixture(autouse=True)
def _fake_runtime(request, monkeypatch):
    if "fake-runtime" in request.node.name:
        FakeCuda().install(monkeypatch)


@pytest.fixture
def apart(request):
    """How far apart the clocks of the host and of the device may be, in seconds.

    Only a real GPU has a clock of its own. For the others, it is a few readings of the same scripted one.
    """
    if request.node.callspec.id == "cuda":
        return CLOCKS_APART_SECONDS
    return 8 * request.getfixturevalue("clock").TICK_SECONDS


on_every_device = pytest.mark.parametrize("make_device", DEVICES)


def launch(device, kernel):
    """Queue ``kernel`` on the device's compute stream of this thread."""
    getattr(device, "launch", lambda call: call())(kernel)


@on_every_device
def test_host_memory_has_the_requested_size_and_begins_on_a_page(make_device):
    device = make_device()
    for nbytes in (0, 1, 4096, 3 << 20):
        memory = device.host_memory(nbytes)
        assert isinstance(memory, HostMemory)
        assert memory.tensor.shape == (nbytes,)
        assert memory.tensor.dtype == torch.uint8
        assert memory.tensor.device.type == "cpu"
        assert memory.address % 4096 == 0
        device.release_host_memory(memory)


@on_every_device
def test_device_memory_has_the_requested_size_and_lies_on_the_device(make_device):
    device = make_device()
    for nbytes in (0, 1, 3 << 20):
        memory = device.device_memory(nbytes)
        assert memory.shape == (nbytes,)
        assert memory.dtype == torch.uint8
        assert memory.device.type == device.torch_device.type
        assert memory.data_ptr() % 256 == 0 or device.torch_device.type == "cpu"


@on_every_device
def test_a_copy_is_done_when_its_event_has_passed(make_device):
    device = make_device()
    host, expected = random_host_memory(device, 10_000)
    target = device.device_memory(10_000)
    spans = [(0, 5000, 100), (100, 0, 4900), (5000, 5100, 4900)]
    copies = [
        (target.narrow(0, to, size), host.tensor.narrow(0, at, size)) for at, to, size in spans
    ]
    device.copy(copies, after=()).synchronize()
    for at, to, size in spans:
        assert torch.equal(target.narrow(0, to, size).cpu(), expected.narrow(0, at, size))
    device.release_host_memory(host)


@on_every_device
def test_computation_that_waits_for_a_copy_sees_its_bytes(make_device):
    device = make_device()
    host, expected = random_host_memory(device, 1 << 20)
    target = device.device_memory(1 << 20)
    seen = []
    device.wait(device.copy([(target, host.tensor)], after=()))
    launch(device, lambda: seen.append(target.clone()))
    device.record().synchronize()
    assert torch.equal(seen[0].cpu(), expected)
    device.release_host_memory(host)


@on_every_device
def test_a_copy_waits_for_the_computations_that_it_comes_after(make_device):
    device = make_device()
    first, old = random_host_memory(device, 1 << 20)
    second, new = random_host_memory(device, 1 << 20)
    target = device.device_memory(1 << 20)
    seen = []
    device.wait(device.copy([(target, first.tensor)], after=()))
    launch(device, lambda: seen.append(target.clone()))
    device.copy([(target, second.tensor)], after=(device.record(),)).synchronize()
    assert torch.equal(seen[0].cpu(), old)
    assert torch.equal(target.cpu(), new)
    device.release_host_memory(first)
    device.release_host_memory(second)


@on_every_device
def test_copies_pass_in_order_and_an_empty_one_passes_when_all_before_it_have(make_device):
    device = make_device()
    host, expected = random_host_memory(device, 1 << 20)
    target = device.device_memory(1 << 20)
    device.copy([(target, host.tensor)], after=())
    device.copy((), after=()).synchronize()
    assert torch.equal(target.cpu(), expected)
    device.release_host_memory(host)


@on_every_device
def test_an_event_can_be_waited_for_in_another_thread(make_device):
    device = make_device()
    host, expected = random_host_memory(device, 1 << 20)
    target = device.device_memory(1 << 20)
    copied = device.copy([(target, host.tensor)], after=())
    thread = threading.Thread(target=copied.synchronize)
    thread.start()
    thread.join()
    assert torch.equal(target.cpu(), expected)
    device.release_host_memory(host)


@on_every_device
def test_an_event_passed_between_when_it_was_made_and_when_it_was_waited_for(make_device, apart):
    device = make_device()
    host, _ = random_host_memory(device, 1 << 20)
    target = device.device_memory(1 << 20)
    for call in (
        lambda: device.copy([(target, host.tensor)], after=()),
        lambda: device.record(device.stream()),
    ):
        before = time.perf_counter()
        event = call()
        event.synchronize()
        passed, after = device.passed_at(event), time.perf_counter()
        assert before - apart <= passed <= after
        assert device.passed_at(event) == pytest.approx(passed, abs=apart)
    device.release_host_memory(host)


@on_every_device
def test_times_of_copies_and_of_computations_are_of_one_clock(make_device, apart):
    device = make_device()
    host, _ = random_host_memory(device, 1 << 20)
    target = device.device_memory(1 << 20)
    events = [device.record()]
    for _ in range(3):
        launch(device, target.clone)
        events.append(device.record())
        events.append(device.copy((), after=events[-1:]))
        events.append(device.copy([(target, host.tensor)], after=()))
        device.wait(events[-1])
    events.append(device.record())
    events[-1].synchronize()
    times = [device.passed_at(event) for event in events]
    assert all(a <= b + apart for a, b in itertools.pairwise(times))
    device.release_host_memory(host)


@on_every_device
def test_released_host_memory_is_closed(make_device):
    device = make_device()
    host, _ = random_host_memory(device, 4096)
    device.release_host_memory(host)
    assert host.tensor.numel() == 0


@on_every_device
def test_more_memory_than_there_is_is_refused_with_the_size_in_bytes(make_device):
    device = make_device()
    with pytest.raises(DeviceError, match=r"\d+ bytes"):
        device.device_memory(1 << 60)
    with pytest.raises(DeviceError, match=r"\d+ bytes"):
        device.host_memory(1 << 60)


@on_every_device
def test_free_memory_is_reported_by_devices_that_have_their_own(make_device):
    device = make_device()
    if device.reads_host_images:
        assert device.free_bytes() is None
        return
    device.trim()  # using a part of a larger block that is kept counts as taking all of it
    before = device.free_bytes()
    kept = device.device_memory(64 << 20)
    assert before - (80 << 20) < device.free_bytes() <= before - kept.numel()


@on_every_device
def test_a_device_has_a_name_and_trims_only_unused_memory(make_device):
    device = make_device()
    assert device.model_name()
    host, expected = random_host_memory(device, 1 << 20)
    target = device.device_memory(1 << 20)
    device.copy([(target, host.tensor)], after=()).synchronize()
    device.trim()
    assert torch.equal(target.cpu(), expected)
    device.release_host_memory(host)


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_a_machine_without_a_gpu_computes_on_its_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_device(name), CpuDevice)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toaster", "'toaster' is not a device; use auto, cpu, cuda or cuda:N"),
        ("", "'' is not a device"),
        ("meta", "'meta' is not supported; use auto, cpu, cuda or cuda:N"),
        ("cuda", "cuda was asked for, but torch .* sees no CUDA device here"),
        ("cuda:1", "cuda:1 was asked for, but torch .* sees no CUDA device here"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_a_remedy(name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=message):
        open_device(name)


@pytest.mark.cuda
@needs_cuda
def test_a_gpu_beyond_the_last_one_is_refused_with_the_count():
    with pytest.raises(DeviceError, match="cuda:99 was asked for, but this machine has"):
        open_device("cuda:99")
