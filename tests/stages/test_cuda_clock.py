"""The clock of CUDA devices: when events passed, by the host's clock."""

import itertools
import time

import pytest
import torch
from support.gpus import CLOCKS_APART_SECONDS, needs_cuda

from layerstream.stages.devices import cuda_clock as clock_module
from layerstream.stages.devices.cuda import CudaDevice
from layerstream.stages.devices.cuda_clock import CudaClock


@pytest.mark.cuda
@needs_cuda
def test_a_gpu_reports_its_own_times_however_late_the_host_queries_them(monkeypatch):
    device = CudaDevice(torch.device("cuda"))
    copied = device.copy((), after=())  # older than the first anchor, as its first events are
    begun = device.record()
    torch.cuda._sleep(200_000_000)
    ended = device.record()
    assert device.passed_at(ended) is None
    for event in (copied, begun):  # a GPU takes some microseconds to reach them
        event.synchronize()
    assert device.passed_at(copied) < device.passed_at(begun) + CLOCKS_APART_SECONDS
    ended.synchronize()
    took = begun.elapsed_time(ended) / 1e3
    for age in (1e9, 0.0):  # with one anchor for both, and with one for each
        monkeypatch.setattr(clock_module, "_ANCHOR_SECONDS", age)
        between = device.passed_at(ended) - device.passed_at(begun)
        assert between == pytest.approx(took, abs=CLOCKS_APART_SECONDS)
    assert took > 0.01


class ScriptedEvent:
    """An event of a GPU whose clock is ``ahead`` of the host's; ``answers`` are those of ``query``."""

    ahead = 1000.0
    answers = ()

    def __init__(self, **_arguments):
        self.recorded = 0.0

    def record(self, _stream):
        self.recorded = time.perf_counter() + self.ahead
        self.answers = iter(self.answers)

    def query(self):
        answer = next(iter(self.answers), True)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def elapsed_time(self, other):
        return (other.recorded - self.recorded) * 1e3


@pytest.fixture
def cuda_clock(monkeypatch, clock):  # noqa: ARG001 - the host's
    """The clock of a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: torch.Stream(device="cpu"))
    monkeypatch.setattr(torch.cuda, "Event", ScriptedEvent)
    return CudaClock(torch.device("cuda:0"))


def test_times_of_a_gpu_are_by_the_hosts_clock_also_for_events_older_than_the_anchor(
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


def test_a_gpu_that_has_failed_reports_no_times_and_raises_nothing(cuda_clock):
    event = ScriptedEvent()
    event.answers = [False, RuntimeError("unspecified launch failure")]
    event.record(None)
    assert cuda_clock.passed_at(event) is None
    assert cuda_clock.passed_at(event) is None


def test_an_anchor_that_does_not_pass_at_once_is_not_waited_for(cuda_clock, monkeypatch):
    event = ScriptedEvent()
    event.record(None)
    passed = cuda_clock.passed_at(event)
    monkeypatch.setattr(ScriptedEvent, "answers", itertools.repeat(False))
    monkeypatch.setattr(clock_module, "_ANCHOR_SECONDS", 0.0)
    assert cuda_clock.passed_at(event) == passed  # by the previous anchor


class Interrupted:
    """The host's clock, and events that take 20 us to pass; a query takes 5 us, and those of ``delays`` longer."""

    def __init__(self, monkeypatch, *, delays=()):
        self.now, self.began = 100.0, 100.0
        self.queries, self.delays = 0, dict(delays)
        clock = self

        class Event(ScriptedEvent):
            def record(self, _stream):
                self.recorded = clock.now + 20e-6

            def query(self):
                passed = clock.now >= self.recorded
                clock.queries += 1
                clock.now += 5e-6 + clock.delays.get(clock.queries, 0.0)
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


@pytest.mark.parametrize("query", range(1, 8))
@pytest.mark.parametrize("seconds", [0.0004, 0.005])
def test_times_are_right_whichever_query_of_an_anchor_is_interrupted(
    cuda_clock, monkeypatch, query, seconds
):
    host = Interrupted(monkeypatch, delays={query: seconds})
    cuda_clock.passed_at(host.passed())
    host.now += 1.0  # enough to try again
    event = host.passed()
    assert 0 <= cuda_clock.passed_at(event) - event.recorded <= 0.0001


def test_an_anchor_that_is_not_seen_to_pass_in_time_is_retried_soon_and_never_for_long(
    cuda_clock, monkeypatch
):
    host = Interrupted(monkeypatch, delays=dict.fromkeys(range(1, 100), 0.0004))
    event = host.passed()
    began = host.now
    assert cuda_clock.passed_at(event) == pytest.approx(event.recorded, abs=0.001)  # uncertain
    assert host.now - began < 0.003
    queries = host.queries
    cuda_clock.passed_at(event)
    assert host.queries == queries + 1  # of the event alone
    host.delays.clear()
    host.now += 0.2
    assert cuda_clock.passed_at(event) == pytest.approx(event.recorded, abs=0.0001)
