"""A GPU for tests, and a stand-in where there is none: host memory, behind the same plans and the same stages.

The stand-in proves the tests, not the GPU. Needs pytest and what the library needs, nothing else.
"""

import gc
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from layerstream.pipeline import Hardware, options, starting
from layerstream.stages.arena import RingArena
from layerstream.stages.devices.cuda import CudaDevice
from support.checkpoints import GPU
from support.fake_device import POISON, FakeDevice

__all__ = [
    "ALL_GPUS",
    "CLOCKS_APART_SECONDS",
    "SECONDS",
    "SLEEP_CYCLES",
    "Cuda",
    "StandIn",
    "all_correct",
    "keep",
    "needs_cuda",
    "poison_returned_host_slots",
    "random_host_memory",
]

# Some 10 ms of a GPU of 2 GHz: long compared with the copy of a small layer, short compared with a test.
SLEEP_CYCLES = 20_000_000
SECONDS = 70  # that a test may take
# Between the host's clock and a GPU's: to see an event pass takes some ten microseconds, longer on a busy machine.
CLOCKS_APART_SECONDS = 0.005


class SlowCopies(CudaDevice):
    """Before each copy its destination is poisoned, and the copy comes late."""

    sleep_cycles = SLEEP_CYCLES

    def copy(self, copies, *, after):
        for event in after:
            event.wait(self._stream)
        with torch.cuda.stream(self._stream):
            for destination, _ in copies:
                destination.fill_(POISON)
            torch.cuda._sleep(self.sleep_cycles)
        return super().copy(copies, after=())


class UnawaitedCopies(SlowCopies):
    """As if the compute stage forgot to wait for copies."""

    sleep_cycles = 3 * SLEEP_CYCLES  # later than the kernels, however the two began

    def wait(self, event):
        pass


class UnawaitedKernels(SlowCopies):
    """As if the transfer stage forgot to wait for the computation that reads the slot."""

    sleep_cycles = 1  # earlier than the kernels

    def copy(self, copies, *, after):  # noqa: ARG002 - that it is not used is the point
        return super().copy(copies, after=())


class Cuda:
    """The GPU itself."""

    torch_device = torch.device("cuda:0")
    slow, unawaited_copies, unawaited_kernels = SlowCopies, UnawaitedCopies, UnawaitedKernels

    def __init__(self, monkeypatch):
        _ = monkeypatch

    def device(self, kind=CudaDevice):
        return kind(self.torch_device)

    def new_stream(self, device):
        _ = device
        return torch.cuda.Stream()

    def launch(self, device, kernel):
        _ = device
        torch.cuda._sleep(SLEEP_CYCLES)
        kernel()

    def finish(self, device):
        device.drain()

    @contextmanager
    def peak(self):
        """A list that gets the peaks by torch's counter and by the driver's, above what was in use before."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        free, allocated = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        lowest, stop, peaks = [free], threading.Event(), []

        def watch():
            while not stop.wait(0.001):
                lowest.append(min(lowest.pop(), torch.cuda.mem_get_info()[0]))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield peaks
        finally:
            stop.set()
            thread.join()
        peaks += [torch.cuda.max_memory_allocated() - allocated, free - lowest[0]]


class EagerFake(FakeDevice):
    """The fake device for computation that it does not see: waits are over before it begins."""

    def copy(self, copies, *, after):
        event = super().copy(copies, after=after)
        event.synchronize()
        return event

    def wait(self, event):
        event.synchronize()


class UnawaitedCopiesFake(FakeDevice):
    """As if the compute stage forgot to wait for copies."""

    def __init__(self):
        super().__init__(hold_copies=True)

    def wait(self, event):
        pass


class UnawaitedKernelsFake(FakeDevice):
    """As if the transfer stage forgot to wait for the computation that reads the slot."""

    def copy(self, copies, *, after):  # noqa: ARG002 - that it is not used is the point
        return super().copy(copies, after=())


class StandIn:
    """Host memory in place of a GPU."""

    torch_device = torch.device("cpu")
    slow = FakeDevice
    unawaited_copies, unawaited_kernels = UnawaitedCopiesFake, UnawaitedKernelsFake

    def __init__(self, monkeypatch):
        self.opened = EagerFake()

        async def probe(checkpoint, device="auto", *, dtype=None, measure=True, most_bytes=None):
            _ = checkpoint, device, dtype, measure, most_bytes
            return replace(GPU, vram_free_bytes=self.opened.free_bytes())

        monkeypatch.setattr(Hardware, "probe", probe)
        for module in (options, starting):
            monkeypatch.setattr(module, "open_device", lambda _: self.opened)

    def device(self, kind=FakeDevice):
        return kind()

    def new_stream(self, device):
        return device.new_stream()

    def launch(self, device, kernel):
        device.launch(kernel)

    def finish(self, device):
        device.release_copies()
        device.finish()

    @contextmanager
    def peak(self):
        before, peaks = self.opened.free_bytes(), []
        yield peaks
        peaks.append(before - self.opened.free_bytes())


def random_host_memory(device, nbytes):
    """Host memory of ``device`` with random bytes, and a copy of them."""
    memory = device.host_memory(nbytes)
    expected = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    memory.tensor.copy_(expected)
    return memory, expected


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device here"
)
ALL_GPUS = [
    pytest.param(Cuda, id="cuda", marks=[pytest.mark.cuda, needs_cuda]),
    pytest.param(StandIn, id="stand-in"),
]


def keep(seen, tensors):
    """Keep copies of ``tensors`` in ``seen``, which has a list for each name."""
    for name, tensor in tensors.items():
        seen.setdefault(name, []).append(tensor.clone())


def all_correct(seen, expected):
    """Whether every copy that was kept of every tensor equals what is in the file."""
    return seen.keys() == expected.keys() and all(
        torch.equal(copy.cpu(), expected[name]) for name in expected for copy in seen[name]
    )


def poison_returned_host_slots(monkeypatch):
    """A host slot may be overwritten as soon as it is given back; here it is, at once."""
    give_back = RingArena.give_back

    def poison_and_give_back(arena, slot, after=()):
        if not after and not slot._freed and slot.tensor.device.type == "cpu":
            slot.tensor.fill_(POISON)
        give_back(arena, slot, after)

    monkeypatch.setattr(RingArena, "give_back", poison_and_give_back)
