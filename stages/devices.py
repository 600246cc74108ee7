"""Where computation runs: the CPU, or a CUDA device. The only file that touches ``torch.cuda``.

A device hands out memory, copies bytes from a host image to a device image, and gives events, with which
stages tell one another what has been done. Only ``drain``, behind all work, synchronises a whole device.
"""

import logging
import math
import platform
import time
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from layerstream.stages.errors import DeviceError
from layerstream.stages.libraries import Leftovers
from layerstream.stages.memory import HostMemory

__all__ = ["Copy", "CpuDevice", "CudaDevice", "Device", "Event", "missing_device", "open_device"]

logger = logging.getLogger(__name__)

Copy = tuple[torch.Tensor, torch.Tensor]  # (destination, source): uint8 views of equal size

# How old an anchor may be. CUDA tells milliseconds as a 32-bit float, which after ten seconds resolves a
# microsecond; and the two clocks drift by some parts in 100,000.
_ANCHOR_SECONDS = 10.0
# How long anchors are looked at to pass, all tries together: the event loop does so, and they have nothing to wait
# for but another process's turn.
_ANCHORING_SECONDS = 0.001
# How far apart the host's times around an anchor may lie: it takes some ten microseconds to pass and be seen, but
# the looking thread may lose the processor meanwhile.
_APART_SECONDS = 0.0001
# From one attempt that failed to the next.
_AGAIN_SECONDS = 0.1


class Event(Protocol):
    """A point in a stream of work."""

    def synchronize(self) -> None:
        """Block the calling thread until the work before this point is done."""


class Device(Protocol):
    """Memory, copies and events of one device. Its methods may be called from any thread."""

    @property
    def torch_device(self) -> torch.device:
        """Where computation runs."""

    @property
    def reads_host_images(self) -> bool:
        """Whether computation reads host images where they lie, so that only fused tensors are copied."""

    def model_name(self) -> str:
        """What the device is called by its maker, to tell it from others."""

    def free_bytes(self) -> int | None:
        """Device memory that this process may still take; None where that is the host's."""

    def host_memory(self, nbytes: int) -> HostMemory:
        """Host memory that copies to this device run at full speed from. The caller closes it."""

    def release_host_memory(self, memory: HostMemory) -> None:
        """Close memory that ``host_memory`` gave."""

    def device_memory(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8 ``[nbytes]``.

        Raises:
            DeviceError: the device has not that much free.
        """

    def drain(self) -> None:
        """Block until the device has done all that it was given: its memory is about to be freed."""

    def trim(self) -> None:
        """Give back what allocators keep and nobody uses: other things are about to need it, or nothing is."""

    def copy(self, copies: Sequence[Copy], *, after: Sequence[Event]) -> Event:
        """Start ``copies`` once ``after`` has passed; the event passes when they are done."""

    def stream(self) -> Hashable:
        """What the calling thread's work on the device is queued on now. Equal for equal streams."""

    def computing_on(self, stream: Hashable) -> AbstractContextManager[object]:
        """Queue the calling thread's work on ``stream``, which ``stream()`` gave in any thread."""

    def record(self, stream: Hashable = None) -> Event:
        """The work queued on ``stream`` so far; by default on the calling thread's own."""

    def wait(self, event: Event) -> None:
        """Let the work that the calling thread gives to the device from now on wait for ``event``."""

    def passed_at(self, event: Event) -> float | None:
        """When ``event`` passed, by ``time.perf_counter``. Returns at once.

        None: it has not passed yet, or the device has failed, and it never will.
        """


class _Passed:
    """An event of a device that does its work at once."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once."""


class CpuDevice:
    """The host's own processor: computation reads host images, and copies are done when they return."""

    torch_device = torch.device("cpu")
    reads_host_images = True

    def model_name(self) -> str:
        """The architecture, as the system calls it."""
        return platform.machine()

    def free_bytes(self) -> int | None:
        """None: the host's memory is all there is."""
        return None

    def host_memory(self, nbytes: int) -> HostMemory:
        """Memory on huge pages."""
        return HostMemory(nbytes)

    def release_host_memory(self, memory: HostMemory) -> None:
        """Close ``memory``."""
        memory.close()

    def device_memory(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory, page-aligned, gone with its last view."""
        return HostMemory(nbytes).tensor

    def drain(self) -> None:
        """Nothing to do: work is done when it returns."""

    def trim(self) -> None:
        """Return what the C library and MKL keep to the system."""
        Leftovers().release()

    def copy(self, copies: Sequence[Copy], *, after: Sequence[Event]) -> Event:
        """Copy now."""
        for event in after:
            event.synchronize()
        for destination, source in copies:
            destination.copy_(source)
        return _Passed()

    def stream(self) -> Hashable:
        """None: there are no queues."""
        return None

    def computing_on(self, stream: Hashable) -> AbstractContextManager[object]:  # noqa: ARG002
        """Nothing to do: work is done when it returns."""
        return nullcontext()

    def record(self, stream: Hashable = None) -> Event:  # noqa: ARG002
        """An event that has passed."""
        return _Passed()

    def wait(self, event: Event) -> None:
        """Wait for ``event``, which has passed unless it comes from another device."""
        event.synchronize()

    def passed_at(self, event: Event) -> float:
        """When ``event`` was made: work is done when it returns."""
        assert isinstance(event, _Passed)  # noqa: S101
        return event.seconds


class CudaDevice:
    """A CUDA device, with a stream of its own for copies.

    Args:
        torch_device: such as ``torch.device("cuda:0")``.

    Raises:
        DeviceError: there is no such device.
    """

    reads_host_images = False

    def __init__(self, torch_device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                f"device {torch_device} was asked for, but torch {torch.__version__} sees no CUDA device here; "
                'use device="cpu" or install a CUDA build of torch'
            )
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
        if index >= count:
            raise DeviceError(
                f"device cuda:{index} was asked for, but this machine has {count}; use cuda:0 to cuda:{count - 1}"
            )
        self.torch_device = torch.device("cuda", index)
        # High priority: a copy that waits behind compute kernels for its turn starves the next batch.
        self._stream = torch.cuda.Stream(self.torch_device, priority=-1)  # type: ignore[no-untyped-call]
        self._clock = _CudaClock(self.torch_device)

    def model_name(self) -> str:
        """As the driver calls it."""
        return torch.cuda.get_device_name(self.torch_device)

    def free_bytes(self) -> int:
        """What the driver has free, and what torch's allocator keeps but does not use."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        stats = torch.cuda.memory_stats(self.torch_device)
        held = stats.get("reserved_bytes.all.current", 0) - stats.get(
            "allocated_bytes.all.current", 0
        )
        return int(free + held - stats.get("inactive_split_bytes.all.current", 0))

    def host_memory(self, nbytes: int) -> HostMemory:
        """Page-locked memory of exactly ``nbytes``.

        torch's own pinned allocator rounds each block up to a power of two, so anonymous memory is
        registered with the driver instead.
        """
        memory = HostMemory(nbytes)
        memory.tensor.zero_()  # registering faults pages in one by one; touching them first does it in bulk
        # In one piece: a copy that spans two registrations is refused, and a segment may lie anywhere.
        refusal = self._cudart("cudaHostRegister", memory.address, nbytes, 0) if nbytes else None
        if refusal is not None:
            memory.close()
            raise DeviceError(
                f"{self.torch_device} refused to page-lock {nbytes} bytes of host memory "
                f"({refusal}); lower the host budget or raise the limit on locked "
                "memory (ulimit -l)"
            )
        return memory

    def release_host_memory(self, memory: HostMemory) -> None:
        """Unregister and close ``memory``, once no copy reads it any more."""
        try:
            self._stream.synchronize()
            refusal = self._cudart("cudaHostUnregister", memory.address) if memory.nbytes else None
            if refusal is not None:
                logger.warning("cudaHostUnregister failed: %s", refusal)
        except RuntimeError as error:  # a kernel has faulted: nothing runs on this device any more
            logger.warning(
                "%s has failed, host memory stays registered: %s", self.torch_device, error
            )
        finally:
            memory.close()

    def _cudart(self, name: str, *args: int) -> str | None:
        """Call the CUDA runtime with this device current; returns what it has to complain of."""
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.torch_device):
            code = int(getattr(cudart, name)(*args))
            if code == 0:
                return None
            # The runtime remembers a failure for this thread, and torch would raise it at the next kernel,
            # which has nothing to do with it. torch has no call to clear it but to meet it.
            try:
                torch.empty(1, device=self.torch_device).fill_(0)
            except RuntimeError as error:
                logger.debug("cleared after %s: %s", name, error)
        return str(torch.cuda.CudaError(code))

    def device_memory(self, nbytes: int) -> torch.Tensor:
        """Memory from torch's caching allocator, so that its counters tell the whole truth."""
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.torch_device)
            raise DeviceError(
                f"{self.torch_device} has {free} of {total} bytes free, the plan needs {nbytes} more; "
                "lower the VRAM budget or free memory on the device"
            ) from error
        # The allocator may hand out a block that kernels of its own stream still use: fine for work on
        # that stream, but copies are made on ours.
        self._stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        return memory

    def drain(self) -> None:
        """Block until every stream of the device is empty."""
        try:
            torch.cuda.synchronize(self.torch_device)
        except RuntimeError:
            # Sticky: whoever computes has been told, or is told at his next call. Nothing runs any more, so
            # memory may go; raising here would hide the error that the pipeline is being closed for.
            logger.exception("%s has failed", self.torch_device)

    def trim(self) -> None:
        """Give the free blocks of the caching allocator back to the driver."""
        with torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()

    def copy(self, copies: Sequence[Copy], *, after: Sequence[Event]) -> Event:
        """Put ``copies`` on the copy stream; nothing here waits on the host."""
        for event in after:
            event.wait(self._stream)  # type: ignore[attr-defined]  # a CUDA event of ours
        with torch.cuda.stream(self._stream):
            for destination, source in copies:
                destination.copy_(source, non_blocking=True)
        return self.record(self._stream)

    def stream(self) -> torch.cuda.Stream:
        """The calling thread's current stream."""
        return torch.cuda.current_stream(self.torch_device)

    def computing_on(self, stream: Hashable) -> AbstractContextManager[object]:
        """Make ``stream`` the calling thread's current one."""
        assert isinstance(stream, torch.cuda.Stream)  # noqa: S101
        return torch.cuda.stream(stream)

    def record(self, stream: Hashable = None) -> Event:
        """``stream``, or else the calling thread's current one, as far as it is filled."""
        # Blocking: a thread that waits for it would otherwise spin on a core.
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream if isinstance(stream, torch.cuda.Stream) else self.stream())
        return event

    def wait(self, event: Event) -> None:
        """Let the calling thread's current stream wait for ``event``."""
        event.wait(torch.cuda.current_stream(self.torch_device))  # type: ignore[attr-defined]

    def passed_at(self, event: Event) -> float | None:
        """When the device came to ``event``."""
        assert isinstance(event, torch.cuda.Event)  # noqa: S101
        return self._clock.passed_at(event)


class _CudaClock:
    """Tells when events of a device passed, by the host's clock.

    CUDA tells the time between two events. So one is needed whose time the host knows: an anchor, on a stream
    where nothing is before it, which the host has seen pass between two of its times. Renewed now and then, it may
    well be younger than an event, whose time is then less than none.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self._stream = torch.cuda.Stream(torch_device, priority=-1)  # type: ignore[no-untyped-call]
        self._anchor: tuple[torch.cuda.Event, float] | None = None
        self._renewed_at = -math.inf

    def passed_at(self, event: torch.cuda.Event) -> float | None:
        """When ``event`` passed, by ``time.perf_counter``; None where that cannot be told now, or ever."""
        try:
            if not event.query():  # type: ignore[no-untyped-call]
                return None
            if time.perf_counter() - self._renewed_at > _ANCHOR_SECONDS:
                self._renew()
            if self._anchor is None:
                return None
            anchor, seconds = self._anchor
            passed: float = seconds + anchor.elapsed_time(event) / 1e3
        except RuntimeError as error:
            # A kernel has faulted: nothing passes on this device any more.
            logger.debug("%s tells no times: %s", self._stream.device, error)
            return None
        return min(passed, time.perf_counter())

    def _renew(self) -> None:
        """Take a new anchor if one is seen to pass in time; where there is none yet, one that is less sure will do."""
        now = time.perf_counter()
        self._renewed_at = now + _AGAIN_SECONDS - _ANCHOR_SECONDS  # unless it comes to more
        while (seen := self._new_anchor(now + _ANCHORING_SECONDS)) is not None:
            anchor, seconds, apart = seen
            sure = apart <= _APART_SECONDS
            if sure or self._anchor is None:
                self._anchor = anchor, seconds
            if sure:
                self._renewed_at = now
                return

    def _new_anchor(self, until: float) -> tuple[torch.cuda.Event, float, float] | None:
        """An event, the time when it was seen to have passed, and how long before that it may have been.

        None: it had not passed by ``until``, since torch has others use the stream too.
        """
        anchor = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # It passed later than the last look that did not see it pass began.
        before = looking = time.perf_counter()
        anchor.record(self._stream)
        while looking < until:
            if anchor.query():  # type: ignore[no-untyped-call]
                seen = time.perf_counter()
                return anchor, seen, seen - before
            before, looking = looking, time.perf_counter()
        return None


def open_device(name: str) -> CpuDevice | CudaDevice:
    """The device called ``name``: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        DeviceError: no such device here.
    """
    torch_device = _torch_device(name)
    return CpuDevice() if torch_device.type == "cpu" else CudaDevice(torch_device)


def missing_device(name: str) -> str | None:
    """The full name of a device that could be, but is not here, such as "cuda:0"; None for one that is.

    Raises:
        DeviceError: there is no such kind of device.
    """
    torch_device = _torch_device(name)
    index = torch_device.index or 0
    if torch_device.type == "cpu" or index < torch.cuda.device_count():
        return None
    return f"cuda:{index}"


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch_device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if torch_device.type not in {"cpu", "cuda"}:
        raise DeviceError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return torch_device
