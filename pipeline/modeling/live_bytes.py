"""Counts the bytes of the tensors that operations make, while they are alive."""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layerstream.pipeline.modeling.kernel_copies import kernel_code_bytes, kernel_copies
from layerstream.pipeline.planning.workload_memory import WASTE

__all__ = ["LiveBytes", "tensors_in"]

_CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations have made and that are still alive. Views count once.

    Args:
        limit: How many operations may run; None for any number.
        mapped_from_bytes: The size from which the C library maps blocks one by one; None if it keeps all that are freed.
        device: The one that will compute; kernels of a CPU compile code in the memory that is counted.

    Attributes:
        now_bytes: What is alive at present.
        peak_bytes: The most that was alive at any time, with what kernels take while they run.
        peak_taken_bytes: The most that a process takes for them: ``WASTE`` times what is kept when it is freed.
    """

    def __init__(
        self,
        *,
        limit: int | None = None,
        mapped_from_bytes: int | None = None,
        device: torch.device = _CPU,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_cpu = device.type == "cpu"
        self._mapped_from_bytes = mapped_from_bytes
        self._now_taken_bytes = 0
        self.now_bytes = 0
        self.peak_bytes = self.peak_taken_bytes = 0
        self._operations_left = limit
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._compiled: dict[tuple[torch.Size, ...], int] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the tensors that ``func`` makes."""
        if self._operations_left is not None:
            self._operations_left -= 1
            if self._operations_left < 0:
                raise RuntimeError("the pass takes too many operations to be measured")
        result = func(*args, **(kwargs or {}))
        inputs: set[int] | None = None
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if type(tensor) is not torch.Tensor:
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._alive:
                continue
            if inputs is None:
                inputs = {id(each.untyped_storage()) for each in tensors_in(args)}
            if id(storage) not in inputs:  # else a view of a weight or an input
                self._count(storage)
        if copies := kernel_copies(func, args, result):
            self.peak_bytes = max(self.peak_bytes, self.now_bytes + sum(copies))
            taken = self._now_taken_bytes + sum(map(self.taken, copies))
            self.peak_taken_bytes = max(self.peak_taken_bytes, taken)
        if self._on_cpu and (code_bytes := kernel_code_bytes(func, args, result)):
            self._compile((args[0].shape, args[1].shape), code_bytes)
        return result

    def taken(self, nbytes: int) -> int:
        """What a process takes for a tensor of ``nbytes``."""
        mapped = self._mapped_from_bytes is not None and nbytes >= self._mapped_from_bytes
        return nbytes if mapped else WASTE * nbytes

    def reset_peak(self) -> None:
        """Forget the peaks before the present."""
        self.peak_bytes, self.peak_taken_bytes = self.now_bytes, self._now_taken_bytes

    def _compile(self, shapes: tuple[torch.Size, ...], nbytes: int) -> None:
        """Count code that is kept."""
        more = nbytes - self._compiled.setdefault(shapes, 0)
        self._compiled[shapes] = nbytes
        self.now_bytes += more
        self._now_taken_bytes += more
        self.peak_bytes += more
        self.peak_taken_bytes += more

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()

        def forget(_: Any) -> None:
            del self._alive[key]
            self.now_bytes -= nbytes
            self._now_taken_bytes -= self.taken(nbytes)

        self._alive[key] = weakref.ref(storage, forget)
        self.now_bytes += nbytes
        self._now_taken_bytes += self.taken(nbytes)
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        self.peak_taken_bytes = max(self.peak_taken_bytes, self._now_taken_bytes)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in ``value``: in lists, mappings and attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(list(vars(value).values()))
