"""A device that keeps streams and events apart, so that a missing wait fails a test without a GPU.

It does everything as late as the recorded waits allow: a kernel runs when something depends on it, a copy when
something waits for it. Where a stage forgets a wait, the bytes are not there yet, or not any more.

Or it works by a clock, as a GPU does: copies and kernels take their time, whatever the host does meanwhile. The
clock is scripted, so that the host takes no time and a busy machine makes no difference.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from layerstream.stages.devices.protocol import Copy
from layerstream.stages.errors import DeviceError
from layerstream.stages.memory import HostMemory

__all__ = ["POISON", "FakeDevice", "FakeEvent", "ScriptedClock"]

# The bytes of memory that was never written: as a float -2.3e-16, as a bfloat16 similar, never a weight.
POISON = 0xA5


class ScriptedClock:
    """Replaces ``time.perf_counter``, so that the host's work takes no time, however busy the machine is.

    Time passes when the test says so, when something waits for a device that works by this clock, and a little
    with every reading, so that what comes first is earlier.
    """

    TICK_SECONDS = 1e-7

    def __init__(self) -> None:
        self._seconds = 1.0
        self._changed = threading.Condition()
        self._stopped = False

    def install(self, monkeypatch: Any) -> "ScriptedClock":
        monkeypatch.setattr(time, "perf_counter", self)
        return self

    def __call__(self) -> float:
        with self._changed:
            self._seconds += self.TICK_SECONDS
            return self._seconds

    def go_to(self, seconds: float) -> None:
        """Advance to ``seconds`` as soon as time may pass, unless it is later already."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._stopped, timeout=60), "time stood still"
            self._seconds = max(self._seconds, seconds)

    def stop(self) -> None:
        """Make waits for a device last until ``go_on``."""
        with self._changed:
            self._stopped = True

    def go_on(self) -> None:
        with self._changed:
            self._stopped = False
            self._changed.notify_all()


class _Stream:
    """Work in order, of which the first ``done`` steps have run. At ``seconds`` the device has finished all of it."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self.done = 0
        self.seconds = 0.0

    def add(self, work: Callable[[], None], *, seconds: float) -> None:
        self.waiting.append(work)
        self.seconds = max(self.seconds, time.perf_counter()) + seconds

    def add_wait(self, event: "FakeEvent") -> None:
        self.waiting.append(lambda: event.stream.run_to(event.position))
        self.seconds = max(self.seconds, event.seconds)

    @property
    def end(self) -> int:
        return self.done + len(self.waiting)

    def run_to(self, position: int) -> None:
        while self.done < position:
            work = self.waiting.popleft()
            work()
            self.done += 1


class FakeEvent:
    """A point in a stream."""

    def __init__(self, device: "FakeDevice", stream: _Stream) -> None:
        self.device = device
        self.stream = stream
        self.position = stream.end
        self.seconds = max(stream.seconds, time.perf_counter())

    @property
    def passed(self) -> bool:
        return self.stream.done >= self.position

    def synchronize(self) -> None:
        self.device.run_to(self)


class FakeDevice:
    """Simulates a GPU with host memory.

    One stream copies. Every thread has a compute stream of its own, as if it had made one current. Tests queue
    work on it with ``launch``, and run it with ``finish``.

    Args:
        memory_bytes: Size of the device.
        hold_copies: Copies do not run when the host waits for them, but only when a kernel depends on them,
            until ``release_copies``: the slowest possible copy engine.
        clock: If given, the device works by it.
        copy_seconds: Duration of each copy by that clock, from when its dependencies are done.
    """

    torch_device = torch.device("cpu")
    reads_host_images = False

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        hold_copies: bool = False,
        clock: ScriptedClock | None = None,
        copy_seconds: float = 0.0,
    ) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._streams: list[_Stream] = []
        self._copying = self.new_stream()
        self._local = threading.local()
        self.holds_copies = hold_copies
        self._clock = clock
        self._copy_seconds = copy_seconds
        self._free_bytes = memory_bytes
        self.host_memories = 0  # allocated and not released yet

    # -- the protocol ----------------------------------------------------------------------------

    def model_name(self) -> str:
        return "fake"

    def free_bytes(self) -> int:
        return self._free_bytes

    def host_memory(self, nbytes: int) -> HostMemory:
        memory = HostMemory(nbytes)
        memory.tensor.fill_(POISON)
        self.host_memories += 1
        return memory

    def release_host_memory(self, memory: HostMemory) -> None:
        storage = memory.tensor.untyped_storage().data_ptr()
        with self._changed:
            sources = [
                step.args[1].untyped_storage().data_ptr()
                for step in self._copying.waiting
                if isinstance(step, partial) and step.func is _copy
            ]
        assert storage not in sources, "host memory was released during copies"
        self.host_memories -= 1
        memory.close()

    def device_memory(self, nbytes: int) -> torch.Tensor:
        if nbytes > self._free_bytes:
            raise DeviceError(f"the fake device has {self._free_bytes} bytes free, not {nbytes}")
        self._free_bytes -= nbytes
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        # With the last view of it.
        weakref.finalize(memory.untyped_storage(), self._freed, nbytes).atexit = False
        return memory

    def _freed(self, nbytes: int) -> None:
        self._free_bytes += nbytes

    def drain(self) -> None:
        with self._changed:
            streams = list(self._streams)
        for stream in streams:
            self._wait_until(stream.seconds)
            with self._changed:
                stream.run_to(stream.end)

    def trim(self) -> None:
        pass

    def copy(self, copies: Sequence[Copy], *, after: Sequence[FakeEvent]) -> FakeEvent:
        with self._changed:
            for event in after:
                self._copying.add_wait(event)
            for number, each in enumerate(copies):
                seconds = 0.0 if number else self._copy_seconds
                self._copying.add(partial(_copy, *each), seconds=seconds)
            return FakeEvent(self, self._copying)

    def stream(self) -> _Stream:
        return self._stream

    @contextmanager
    def computing_on(self, stream: _Stream) -> Iterator[None]:
        before, self._local.stream = self._stream, stream
        try:
            yield
        finally:
            self._local.stream = before

    def record(self, stream: _Stream | None = None) -> FakeEvent:
        with self._changed:
            return FakeEvent(self, self._stream if stream is None else stream)

    def wait(self, event: FakeEvent) -> None:
        with self._changed:
            self._stream.add_wait(event)

    def passed_at(self, event: FakeEvent) -> float | None:
        with self._changed:
            if self._clock is not None and event.seconds <= self._clock():
                event.stream.run_to(event.position)
            return event.seconds if event.passed else None

    # -- for tests -------------------------------------------------------------------------------

    @property
    def _stream(self) -> _Stream:
        if not hasattr(self._local, "stream"):
            self._local.stream = self.new_stream()
        return self._local.stream

    def new_stream(self) -> _Stream:
        """A compute stream that is not yet any thread's current one."""
        with self._changed:
            self._streams.append(_Stream())
            return self._streams[-1]

    def launch(self, kernel: Callable[[], None], *, seconds: float = 0.0) -> None:
        """Queue ``kernel`` on the calling thread's compute stream. It runs when something depends on it."""
        with self._changed:
            self._stream.add(kernel, seconds=seconds)

    def finish(self) -> None:
        """Run everything that the calling thread has launched, and what it depends on."""
        self.record().synchronize()

    def release_copies(self) -> None:
        """From here on, copies run when something waits for them."""
        with self._changed:
            self.holds_copies = False
            self._changed.notify_all()

    def run_to(self, event: FakeEvent) -> None:
        with self._changed:
            while self.holds_copies and event.stream is self._copying and not event.passed:
                self._changed.wait()
        self._wait_until(event.seconds)
        with self._changed:
            event.stream.run_to(event.position)
            self._changed.notify_all()

    def _wait_until(self, seconds: float) -> None:
        if self._clock is not None:
            self._clock.go_to(seconds)


def _copy(destination: torch.Tensor, source: torch.Tensor) -> None:
    destination.copy_(source)
