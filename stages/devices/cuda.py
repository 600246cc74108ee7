"""A CUDA device: page-locked memory, a stream for copies, and events. Only ``drain`` synchronises the whole device."""

import logging
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager

import torch

from layerstream.stages.devices.cuda_clock import CudaClock
from layerstream.stages.devices.protocol import Copy, Event
from layerstream.stages.errors import DeviceError
from layerstream.stages.memory import HostMemory

__all__ = ["CudaDevice"]

logger = logging.getLogger(__name__)


class CudaDevice:
    """A CUDA device, with a stream of its own for copies.

    Args:
        torch_device: Such as ``torch.device("cuda:0")``.

    Raises:
        DeviceError: There is no such device.
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
        self._clock = CudaClock(self.torch_device)

    def model_name(self) -> str:
        """The driver's name for it."""
        return torch.cuda.get_device_name(self.torch_device)

    def free_bytes(self) -> int:
        """What the driver has free, plus what torch's allocator keeps unused."""
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
        memory.tensor.zero_()  # registering faults pages in one by one, zeroing in bulk
        # In one piece: a copy that spans two registrations is refused, and a segment may lie anywhere.
        error_text = (
            self._call_runtime("cudaHostRegister", memory.address, nbytes, 0) if nbytes else None
        )
        if error_text is not None:
            memory.close()
            raise DeviceError(
                f"{self.torch_device} refused to page-lock {nbytes} bytes of host memory "
                f"({error_text}); lower the host budget or raise the limit on locked "
                "memory (ulimit -l)"
            )
        return memory

    def release_host_memory(self, memory: HostMemory) -> None:
        """Unregister and close ``memory``, once no copy reads it any more."""
        try:
            self._stream.synchronize()
            error_text = (
                self._call_runtime("cudaHostUnregister", memory.address) if memory.nbytes else None
            )
            if error_text is not None:
                logger.warning("cudaHostUnregister failed: %s", error_text)
        except (
            RuntimeError
        ) as error:  # a kernel has faulted, and nothing runs on this device any more
            logger.warning(
                "%s has failed, host memory stays registered: %s", self.torch_device, error
            )
        finally:
            memory.close()

    def _call_runtime(self, name: str, *args: int) -> str | None:
        """Call the CUDA runtime with this device current; returns the error's text, None on success."""
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.torch_device):
            code = int(getattr(cudart, name)(*args))
            if code == 0:
                return None
            # The runtime keeps the failure as this thread's last error, and torch would raise it at the next,
            # unrelated kernel launch. torch has no call that clears it, so a kernel is launched to catch it.
            try:
                torch.empty(1, device=self.torch_device).fill_(0)
            except RuntimeError as error:
                logger.debug("cleared after %s: %s", name, error)
        return str(torch.cuda.CudaError(code))

    def device_memory(self, nbytes: int) -> torch.Tensor:
        """Memory from torch's caching allocator, so that its counters are complete."""
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
            # The error is sticky: the caller's computation has raised it, or will at its next call. Nothing runs
            # any more, so memory may be freed; raising here would hide the error that closes the pipeline.
            logger.exception("%s has failed", self.torch_device)

    def trim(self) -> None:
        """Return the free blocks of the caching allocator to the driver."""
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
        """An event behind the work so far on ``stream``, by default the calling thread's current one."""
        # Blocking: a thread that waits for it would otherwise spin on a core.
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream if isinstance(stream, torch.cuda.Stream) else self.stream())
        return event

    def wait(self, event: Event) -> None:
        """Make the calling thread's current stream wait for ``event``."""
        event.wait(torch.cuda.current_stream(self.torch_device))  # type: ignore[attr-defined]

    def passed_at(self, event: Event) -> float | None:
        """When the device reached ``event``, by the host's clock."""
        assert isinstance(event, torch.cuda.Event)  # noqa: S101
        return self._clock.passed_at(event)
