"""The memory of fake CUDA devices: tensors whose copies and kernels are queued on streams of the fake runtime."""

import math
from typing import Any

import torch

from support.fake_device import POISON

__all__ = ["DeviceTensor", "PendingCopy", "torch_empty"]

_ALIGNMENT_BYTES = 512  # of torch's allocator
torch_empty = torch.empty  # the original, which the runtime replaces


class PendingCopy:
    """A copy on a stream."""

    def __init__(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.destination, self.source = destination, source

    def __call__(self) -> None:
        self.destination.copy_(self.source)

    def reads(self, address: int, nbytes: int) -> bool:
        return address <= self.source.data_ptr() < address + nbytes


class DeviceTensor(torch.Tensor):
    """Memory of a fake device. ``runtime`` is the ``FakeCuda`` that has it."""

    runtime: Any
    index: int

    @classmethod
    def allocate(
        cls, runtime: Any, index: int, *size: int, dtype: torch.dtype = torch.float32
    ) -> "DeviceTensor":
        nbytes = math.prod(size) * dtype.itemsize
        if nbytes > runtime.free_bytes[index]:
            raise torch.cuda.OutOfMemoryError(f"fake CUDA out of memory: {nbytes} bytes")
        runtime.free_bytes[index] -= nbytes
        block = torch_empty(nbytes + _ALIGNMENT_BYTES, dtype=torch.uint8).fill_(POISON)
        skipped = -block.data_ptr() % _ALIGNMENT_BYTES
        plain = block[skipped : skipped + nbytes].view(dtype).view(*size)
        return plain.as_subclass(cls)._bind(runtime, index)

    def _bind(self, runtime: Any, index: int) -> "DeviceTensor":
        self.runtime, self.index = runtime, index
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = next(each for each in args if isinstance(each, cls))
        runtime, index = vars(tensor)["runtime"], vars(tensor)["index"]
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_ and args[0] is tensor:
                return _queue_copy(runtime, index, *args, **(kwargs or {}))
            if func is torch.Tensor.fill_:
                runtime.launch(lambda: _plain(tensor).fill_(args[1]), index)
                return tensor
            if func == torch.Tensor.device.__get__:
                return torch.device("cuda", index)
            if func is torch.Tensor.cpu:
                runtime.current[index].synchronize()
                return _plain(tensor).clone()
            result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result is not tensor:
            return result.as_subclass(cls)._bind(runtime, index)
        return result


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)


def _queue_copy(
    runtime: Any,
    index: int,
    target: torch.Tensor,
    source: torch.Tensor,
    non_blocking: bool = False,
) -> torch.Tensor:
    page_locked = runtime.registered_device(source.data_ptr(), source.nbytes) is not None
    runtime.launch(PendingCopy(_plain(target), source), index)
    if not page_locked or not non_blocking:
        runtime.pageable_copies += source.nbytes > 0
        runtime.current[index].synchronize()
    return target
