"""One conformance suite for all devices; and proof that the fake one misses no missing wait."""

import itertools
import threading
import time

import pytest
import torch
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.fake_cuda import FakeCuda, RunningCudaDevice
from support.fake_device import POISON, FakeDevice, _FakeEvent
from support.loop import run

from layerstream.pipeline import Pipeline
from layerstream.stages.devices import cuda_clock as clock_module
from layerstream.stages.devices.cpu import CpuDevice
from layerstream.stages.devices.cuda import CudaDevice
from layerstream.stages.devices.cuda_clock import CudaClock
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.errors import DeviceError
from layerstream.stages.memory import HostMemory

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device here"
)

DEVICES = [
    pytest.param(CpuDevice, id="cpu"),
    pytest.param(FakeDevice, id="fake"),
    pytest.param(RunningCudaDevice, id="cuda-on-a-fake-runtime"),
    pytest.param(
        lambda: CudaDevice(torch.device("cuda")), id="cuda", marks=[pytest.mark.cuda, needs_cuda]
    ),
]
# Between the host's clock and a GPU's: to see an anchor pass takes some ten microseconds, and longer on a busy machine.
CLOCKS_APART = 0.005


@pytest.fixture(autouse=True)
def _fake_runtime(request, monkeypatch):
    if "fake-runtime" in request.node.name:
        FakeCuda().install(monkeypatch)


@pytest.fixture
def apart(request):
    """How far the clocks of the host and of the device are from one another, in seconds.

    Only a real GPU has one of its own. With all others, it is a few looks at the same scripted one.
    """
    if request.node.callspec.id == "cuda":
        return CLOCKS_APART
    return 8 * request.getfixturevalue("clock").TICK_SECONDS


on_every_device = pytest.mark.parametrize("make_device", DEVICES)


def launch(device, kernel):
    """Give ``kernel`` to the device's compute stream of this thread."""
    getattr(device, "launch", lambda call: call())(kernel)


def random_bytes(nbytes):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def filled(device, nbytes):
    """Host memory of random bytes, and a copy of them."""
    memory = device.host_memory(nbytes)
    expected = random_bytes(nbytes)
    memory.tensor.copy_(expected)
    return memory, expected


@on_every_device
def test_host_memory_has_the_size_asked_for_and_begins_on_a_page(make_device):
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
def test_device_memory_has_the_size_asked_for_and_lies_on_the_device(make_device):
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
    host, expected = filled(device, 10_000)
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
    host, expected = filled(device, 1 << 20)
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
    first, old = filled(device, 1 << 20)
    second, new = filled(device, 1 << 20)
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
    host, expected = filled(device, 1 << 20)
    target = device.device_memory(1 << 20)
    device.copy([(target, host.tensor)], after=())
    device.copy((), after=()).synchronize()
    assert torch.equal(target.cpu(), expected)
    device.release_host_memory(host)


@on_every_device
def test_an_event_can_be_waited_for_in_another_thread(make_device):
    device = make_device()
    host, expected = filled(device, 1 << 20)
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
    host, _ = filled(device, 1 << 20)
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
    host, _ = filled(device, 1 << 20)
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
    host, _ = filled(device, 4096)
    device.release_host_memory(host)
    assert host.tensor.numel() == 0


@on_every_device
def test_more_memory_than_there_is_is_refused_in_a_sentence(make_device):
    device = make_device()
    with pytest.raises(DeviceError, match=r"\d+ bytes"):
        device.device_memory(1 << 60)
    with pytest.raises(DeviceError, match=r"\d+ bytes"):
        device.host_memory(1 << 60)


@on_every_device
def test_free_memory_is_told_by_devices_that_have_their_own(make_device):
    device = make_device()
    if device.reads_host_images:
        assert device.free_bytes() is None
        return
    device.trim()  # of a block that is kept and larger, all counts as taken when a part of it is
    before = device.free_bytes()
    kept = device.device_memory(64 << 20)
    assert before - (80 << 20) < device.free_bytes() <= before - kept.numel()


@on_every_device
def test_a_device_has_a_name_and_gives_up_only_memory_that_nobody_uses(make_device):
    device = make_device()
    assert device.model_name()
    host, expected = filled(device, 1 << 20)
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
    ("name", "says"),
    [
        ("toaster", "'toaster' is not a device; use auto, cpu, cuda or cuda:N"),
        ("", "'' is not a device"),
        ("meta", "'meta' is not supported; use auto, cpu, cuda or cuda:N"),
        ("cuda", "cuda was asked for, but torch .* sees no CUDA device here"),
        ("cuda:1", "cuda:1 was asked for, but torch .* sees no CUDA device here"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_a_remedy(name, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=says):
        open_device(name)


@pytest.mark.cuda
@needs_cuda
def test_a_gpu_beyond_the_last_one_is_refused_with_the_count():
    with pytest.raises(DeviceError, match="cuda:99 was asked for, but this machine has"):
        open_device("cuda:99")


@pytest.mark.cuda
@needs_cuda
def test_a_gpu_tells_its_own_times_however_long_the_host_takes_to_ask(monkeypatch):
    device = CudaDevice(torch.device("cuda"))
    copied = device.copy((), after=())  # older than the first anchor, as its first events are
    begun = device.record()
    torch.cuda._sleep(200_000_000)
    ended = device.record()
    assert device.passed_at(ended) is None
    for event in (copied, begun):  # a GPU takes some microseconds to come to them
        event.synchronize()
    assert device.passed_at(copied) < device.passed_at(begun) + CLOCKS_APART
    ended.synchronize()
    took = begun.elapsed_time(ended) / 1e3
    for age in (1e9, 0.0):  # with one anchor for both, and with one for each
        monkeypatch.setattr(clock_module, "_ANCHOR_SECONDS", age)
        between = device.passed_at(ended) - device.passed_at(begun)
        assert between == pytest.approx(took, abs=CLOCKS_APART)
    assert took > 0.01


class ScriptedEvent:
    """An event of a GPU whose clock is ``ahead`` of the host's; ``looks`` say whether it has passed."""

    ahead = 1000.0
    looks = ()

    def __init__(self, **_arguments):
        self.recorded = 0.0

    def record(self, _stream):
        self.recorded = time.perf_counter() + self.ahead
        self.looks = iter(self.looks)

    def query(self):
        look = next(iter(self.looks), True)
        if isinstance(look, Exception):
            raise look
        return look

    def elapsed_time(self, other):
        return (other.recorded - self.recorded) * 1e3


@pytest.fixture
def cuda_clock(monkeypatch, clock):  # noqa: ARG001 - it is the host's
    """The clock of a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: torch.Stream(device="cpu"))
    monkeypatch.setattr(torch.cuda, "Event", ScriptedEvent)
    return CudaClock(torch.device("cuda:0"))


def test_times_of_a_gpu_are_told_by_the_hosts_clock_also_of_events_older_than_the_anchor(
    cuda_clock, clock, monkeypatch
):
    apart = 8 * clock.TICK_SECONDS
    before = time.perf_counter()
    first, second = ScriptedEvent(), ScriptedEvent()
    first.record(None)
    between = time.perf_counter()
    assert before <= cuda_clock.passed_at(first) <= between + apart
    second.record(None)
    monkeypatch.setattr(clock_module, "_ANCHOR_SECONDS", 0.0)
    drifted = ScriptedEvent.ahead + 5.0  # the clocks have drifted apart since the last anchor
    monkeypatch.setattr(ScriptedEvent, "ahead", drifted)
    third = ScriptedEvent()
    third.record(None)
    now = time.perf_counter()
    assert between <= cuda_clock.passed_at(third) <= now + apart


def test_a_gpu_that_has_failed_tells_no_times_and_raises_nothing(cuda_clock):
    event = ScriptedEvent()
    event.looks = [False, RuntimeError("unspecified launch failure")]
    event.record(None)
    assert cuda_clock.passed_at(event) is None
    assert cuda_clock.passed_at(event) is None


def test_an_anchor_that_does_not_pass_at_once_is_not_waited_for(cuda_clock, monkeypatch):
    event = ScriptedEvent()
    event.record(None)
    told = cuda_clock.passed_at(event)
    monkeypatch.setattr(ScriptedEvent, "looks", itertools.repeat(False))
    monkeypatch.setattr(clock_module, "_ANCHOR_SECONDS", 0.0)
    assert cuda_clock.passed_at(event) == told  # by the anchor before


class Interrupted:
    """The host's clock, and events that take 20 us to pass; each look at one takes 5 us, and some a while longer."""

    def __init__(self, monkeypatch, *, delays=()):
        self.now, self.began = 100.0, 100.0
        self.looks, self.delays = 0, dict(delays)
        clock = self

        class Event(ScriptedEvent):
            def record(self, _stream):
                self.recorded = clock.now + 20e-6

            def query(self):
                passed = clock.now >= self.recorded
                clock.looks += 1
                clock.now += 5e-6 + clock.delays.get(clock.looks, 0.0)
                return passed

        self.event = Event
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(clock_module, "time", self)

    def perf_counter(self):
        self.now += 1e-7
        return self.now

    def passed(self):
        """An event that has passed by now."""
        event = self.event()
        event.record(None)
        self.now += 1e-3
        return event


@pytest.mark.parametrize("look", range(1, 8))
@pytest.mark.parametrize("seconds", [0.0004, 0.005])
def test_times_are_right_whichever_look_at_an_anchor_is_interrupted(
    cuda_clock, monkeypatch, look, seconds
):
    host = Interrupted(monkeypatch, delays={look: seconds})
    cuda_clock.passed_at(host.passed())
    host.now += 1.0  # enough to try again
    event = host.passed()
    assert 0 <= cuda_clock.passed_at(event) - event.recorded <= 0.0001


def test_an_anchor_that_nobody_sees_pass_in_time_is_looked_for_again_soon_and_never_long(
    cuda_clock, monkeypatch
):
    host = Interrupted(monkeypatch, delays=dict.fromkeys(range(1, 100), 0.0004))
    event = host.passed()
    began = host.now
    assert cuda_clock.passed_at(event) == pytest.approx(event.recorded, abs=0.001)  # unsure
    assert host.now - began < 0.003
    looks = host.looks
    cuda_clock.passed_at(event)
    assert host.looks == looks + 1  # at the event alone
    host.delays.clear()
    host.now += 0.2
    assert cuda_clock.passed_at(event) == pytest.approx(event.recorded, abs=0.0001)


# -- the fake: as late as it may be, or by the clock ----------------------------------------------


def test_on_the_fake_device_nothing_happens_before_somebody_waits_for_it():
    device = FakeDevice()
    host, _ = filled(device, 16)
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
    host, expected = filled(device, 16)
    target = device.device_memory(16)
    copied = device.copy([(target, host.tensor)], after=())
    thread = threading.Thread(target=copied.synchronize)
    thread.start()
    assert bytes(target.numpy()) == bytes([POISON]) * 16
    device.wait(copied)
    device.finish()
    thread.join()
    assert torch.equal(target, expected)


def test_the_fake_device_refuses_to_free_host_memory_under_a_copy():
    device = FakeDevice()
    host, _ = filled(device, 16)
    device.copy([(device.device_memory(16), host.tensor)], after=())
    with pytest.raises(AssertionError, match="under copies not yet done"):
        device.release_host_memory(host)


def test_by_the_clock_the_fake_device_takes_its_time_and_tells_it(clock):
    device = FakeDevice(clock=clock, copy_seconds=0.02)
    host, expected = filled(device, 16)
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
    # Longer by the looks between giving it the one thing and the next.
    assert copying == pytest.approx(0.02, abs=1e-5)
    assert computing == pytest.approx(0.03, abs=1e-5)
    assert times[-1] <= time.perf_counter()
    assert torch.equal(target, expected)


class ForgetsThatComputationWaitsForCopies(FakeDevice):
    """As if ``device.wait(copied)`` were missing in the compute stage."""

    def wait(self, event):
        pass


class ForgetsThatCopiesWaitForComputation(FakeDevice):
    """As if ``after=slot.after`` were missing in the transfer stage."""

    def copy(self, copies, *, after):  # noqa: ARG002 - that it is not used is the point
        return super().copy(copies, after=())


class ForgetsToWaitBeforeTheHostSlotGoesHome(FakeDevice):
    """As if the transfer stage gave the host slot back without ``copied.synchronize()``."""

    def copy(self, copies, *, after):
        event = super().copy(copies, after=after)
        return _NeverWaits(self, event.stream) if copies else event


class _NeverWaits(_FakeEvent):
    def synchronize(self):
        pass


def sweep_late(folder, device, monkeypatch):
    """Stream a checkpoint past kernels that run late; returns what they saw, and what is right.

    Where the device holds its copies back, the kernels of the first batch run before any thread has seen
    a copy; all others run when somebody depends on them, or behind the last batch.
    """
    expected = write_checkpoint(folder, blocks=12)
    plan = arranged(plan_for(folder, GPU), slots=2)
    poison_host_slots_that_go_home(monkeypatch)

    async def main():
        seen = {}

        def keep(name, tensor):
            device.launch(lambda: seen.__setitem__(name, tensor.clone()))

        async with Pipeline(plan, device=device) as pipeline:
            try:
                async for batch in pipeline.sweep():
                    for name, tensor in batch.tensors.items():
                        keep(name, tensor)
                    if device.holds_copies:
                        device.finish()
                        device.release_copies()
                device.finish()
            finally:
                device.release_copies()
        return seen

    return run(main()), expected


def test_a_batch_that_is_computed_with_on_a_stream_of_the_callers_is_not_overwritten(tmp_path):
    expected = write_checkpoint(tmp_path, blocks=12)
    device = FakeDevice()
    stream = device.new_stream()

    async def main():
        seen = {}
        async with Pipeline(arranged(plan_for(tmp_path, GPU), slots=2), device=device) as pipeline:
            async for batch in pipeline.sweep():
                with device.computing_on(stream):  # and left again before the batch is given back
                    for name, tensor in batch.tensors.items():
                        device.launch(
                            lambda name=name, tensor=tensor: seen.update({name: tensor.clone()})
                        )
            device.record(stream).synchronize()
        return seen

    assert equal(run(main()), expected)


def poison_host_slots_that_go_home(monkeypatch):
    """A slot may be written as soon as it is given back; here it is, at once."""
    from layerstream.stages.arena import RingArena

    give_back = RingArena.give_back

    def poisoned(arena, slot, after=()):
        if not after and not slot._freed:
            slot.tensor.fill_(POISON)
        give_back(arena, slot, after)

    monkeypatch.setattr(RingArena, "give_back", poisoned)


def equal(seen, expected):
    assert seen.keys() == expected.keys()
    return all(torch.equal(seen[name], expected[name]) for name in expected)


@pytest.mark.parametrize("hold_copies", [False, True])
def test_a_pipeline_that_waits_gives_every_kernel_the_right_bytes(
    tmp_path, monkeypatch, hold_copies
):
    assert equal(*sweep_late(tmp_path, FakeDevice(hold_copies=hold_copies), monkeypatch))


@pytest.mark.parametrize(
    ("forgetful", "hold_copies"),
    [
        (ForgetsThatComputationWaitsForCopies, True),
        (ForgetsThatCopiesWaitForComputation, False),
        (ForgetsToWaitBeforeTheHostSlotGoesHome, True),
    ],
)
def test_a_missing_wait_is_seen_on_the_fake_device(tmp_path, monkeypatch, forgetful, hold_copies):
    assert not equal(*sweep_late(tmp_path, forgetful(hold_copies=hold_copies), monkeypatch))
