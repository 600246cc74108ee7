"""A CUDA runtime of host memory, under the real ``CudaDevice``: its own code runs where there is no GPU.

As on a GPU, the current device and the current streams belong to a thread, a copy is queued on the current stream,
nothing is sure to run before something waits for it, and a failure is raised again at the next kernel. Errors that a
GPU would show late or never fail at once, such as waiting for an event that was never recorded, or unregistering
memory during a copy.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from layerstream.stages.devices.cuda import CudaDevice
from support.fake_cuda_memory import DeviceTensor, PendingCopy, torch_empty

__all__ = ["FakeCuda", "RunningCudaDevice"]

ALREADY_REGISTERED, NOT_REGISTERED, INVALID = 712, 713, 1
_PAGE_BYTES = 4096


class FakeCuda:
    """The runtime. ``install`` replaces those parts of ``torch.cuda`` that the library calls."""

    def __init__(self, *, devices: int = 2, memory_bytes: int = 1 << 36) -> None:
        self.lock = threading.Condition(threading.RLock())
        # Streams that run nothing merely because a thread waits for them.
        self.held: set[Any] = set()
        self.depth = 0  # of nested work, run because other work depends on it
        self.local = threading.local()
        self.devices = devices
        self.free_bytes = [memory_bytes] * devices
        self.registered: dict[int, tuple[int, int]] = {}  # address: bytes, device
        self.streams: list[Any] = []
        self.pageable_copies = 0

    # -- of the calling thread -------------------------------------------------------------------

    @property
    def device(self) -> int:
        return getattr(self.local, "device", 0)

    @property
    def current(self) -> dict[int, Any]:
        if not hasattr(self.local, "streams"):
            self.local.streams = {i: self.defaults[i] for i in range(self.devices)}
        return self.local.streams

    def fail(self, code: int) -> int:
        """Keep ``code`` as this thread's last error, and return it."""
        self.local.error = code
        return code

    def launch(self, kernel: Callable[[], object], device: int) -> None:
        """Put ``kernel`` on the stream of ``device`` that is current in this thread."""
        error, self.local.error = getattr(self.local, "error", 0), 0
        if error:
            raise RuntimeError(f"CUDA error {error}, raised at an unrelated kernel")
        with self.lock:
            self.current[device].work.append(kernel)

    # -- in place of torch.cuda ------------------------------------------------------------------

    def install(self, monkeypatch: Any) -> "FakeCuda":
        for name, kind in {
            "Stream": _Stream,
            "Event": _Event,
            "device": _Device,
            "stream": _CurrentStream,
        }.items():
            ours = type(name, (kind,), {"runtime": self})
            monkeypatch.setattr(torch.cuda, name, ours)
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: self.devices,
            "current_device": lambda: self.device,
            "get_device_name": lambda device: f"fake GPU {device.index}",
            "mem_get_info": lambda device: (self.free_bytes[device.index], 1 << 40),
            "memory_stats": lambda _: {},
            "empty_cache": lambda: None,
            "synchronize": self._synchronize,
            "cudart": lambda: self,
            "CudaError": lambda code: f"fake CUDA's text for error {code}",
            "current_stream": lambda device: self.current[device.index],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", self._empty)
        self.defaults = [torch.cuda.Stream(torch.device("cuda", i)) for i in range(self.devices)]
        return self

    def _synchronize(self, device: torch.device) -> None:
        for stream in [each for each in self.streams if each.device == device]:
            stream.synchronize()

    def _empty(self, *size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return torch_empty(*size, device=device, **options)
        return DeviceTensor.allocate(self, torch.device(device).index, *size, **options)

    # -- cudart ----------------------------------------------------------------------------------

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        if not nbytes or address % _PAGE_BYTES:
            return self.fail(INVALID)
        if self.registered_device(address, nbytes, partly=True) is not None:
            return self.fail(ALREADY_REGISTERED)
        self.registered[address] = nbytes, self.device
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        if address not in self.registered:
            return self.fail(NOT_REGISTERED)
        nbytes, _ = self.registered[address]
        pending = [
            step for each in self.streams for step in each.work if isinstance(step, PendingCopy)
        ]
        assert not any(step.reads(address, nbytes) for step in pending), (
            "page-locked memory was unregistered during a copy"
        )
        del self.registered[address]
        return 0

    def registered_device(self, address: int, nbytes: int, *, partly: bool = False) -> int | None:
        """The device for which the bytes are page-locked, all of them in one piece."""
        for start, (size, device) in self.registered.items():
            inside = start <= address and address + nbytes <= start + size
            if inside or (partly and address < start + size and start < address + nbytes):
                return device
        return None


class _Stream:
    """Work in order, of which the first ``done`` steps have run."""

    runtime: FakeCuda

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.index = self.runtime.device if device is None else torch.device(device).index
        self.priority = priority
        self.work: deque[Callable[[], object]] = deque()
        self.done = 0
        self.runtime.streams.append(self)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    def run_to(self, position: int) -> None:
        with self.runtime.lock:
            self.runtime.depth += 1
            try:
                while self.done < position:
                    self.work.popleft()()
                    self.done += 1
            finally:
                self.runtime.depth -= 1
                self.runtime.lock.notify_all()

    def synchronize(self) -> None:
        self.run_to(self.done + len(self.work))

    def wait_stream(self, other: "_Stream") -> None:
        event = torch.cuda.Event()
        event.record(other)
        event.wait(self)


class _Event:
    """A point in a stream, once it has been recorded."""

    runtime: FakeCuda

    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.blocking = enable_timing, blocking
        self.stream: _Stream | None = None
        self.seconds = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        stream = self.runtime.current[self.runtime.device] if stream is None else stream
        assert self.stream is None, "an event was recorded twice"
        with self.runtime.lock:
            stream.work.append(self._pass)
            self.stream, self.position = stream, stream.done + len(stream.work)

    def _pass(self) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: _Stream | None = None) -> None:
        assert self.stream is not None, "waiting for an event that was never recorded"
        stream = self.runtime.current[self.runtime.device] if stream is None else stream
        with self.runtime.lock:
            stream.work.append(self.synchronize)

    def synchronize(self) -> None:
        assert self.stream is not None, "waiting for an event that was never recorded"
        with self.runtime.lock:
            while self.stream in self.runtime.held and not (self.runtime.depth or self._passed):
                self.runtime.lock.wait()
            self.stream.run_to(self.position)

    @property
    def _passed(self) -> bool:
        return self.stream is not None and self.stream.done >= self.position

    def query(self) -> bool:
        assert self.stream is not None, "querying an event that was never recorded"
        with self.runtime.lock:
            # Events take no time; kernels and copies run as late as possible.
            steps = list(self.stream.work)[: self.position - self.stream.done]
            if all(getattr(step, "__func__", None) is _Event._pass for step in steps):
                self.stream.run_to(self.position)
            return self._passed

    def elapsed_time(self, other: "_Event") -> float:
        assert {self.timed, other.timed} == {True}, "elapsed time of an event without timing"
        return (other.seconds - self.seconds) * 1e3


class _Device:
    """``torch.cuda.device``."""

    runtime: FakeCuda

    def __init__(self, device: torch.device) -> None:
        self.index = device.index

    def __enter__(self) -> None:
        self.before, self.runtime.local.device = self.runtime.device, self.index

    def __exit__(self, *_: object) -> None:
        self.runtime.local.device = self.before


class _CurrentStream:
    """``torch.cuda.stream``: makes the stream's device current, too."""

    runtime: FakeCuda

    def __init__(self, stream: _Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        index = self.stream.index
        self.before = self.runtime.device, self.runtime.current[index]
        self.runtime.local.device, self.runtime.current[index] = index, self.stream

    def __exit__(self, *_: object) -> None:
        self.runtime.local.device, self.runtime.current[self.stream.index] = self.before


class RunningCudaDevice(CudaDevice):
    """``CudaDevice`` on the fake runtime, with the controls that ``FakeDevice`` has for tests.

    Args:
        index: The number of the device.
        hold_copies: Copies do not run when a thread waits for them, but only when a kernel depends on them,
            until ``release_copies``.
    """

    def __init__(self, index: int = 1, *, hold_copies: bool = False) -> None:
        self.runtime: FakeCuda = torch.cuda.cudart()
        super().__init__(torch.device("cuda", index))
        self.holds_copies = hold_copies
        if hold_copies:
            self.runtime.held.add(self._stream)

    def launch(self, kernel: Callable[[], object]) -> None:
        self.runtime.launch(kernel, self.torch_device.index)

    def finish(self) -> None:
        self.record().synchronize()

    def release_copies(self) -> None:
        with self.runtime.lock:
            self.holds_copies = False
            self.runtime.held.discard(self._stream)
            self.runtime.lock.notify_all()

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.torch_device)
