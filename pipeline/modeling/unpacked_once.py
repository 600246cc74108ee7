"""Weights that several passes multiply with while their layer batch is there, unpacked by the first of them for all."""

import threading
from collections.abc import Callable, Hashable

import torch

__all__ = ["UnpackedOnce"]


class UnpackedOnce:
    """Memory for plain weights of the one layer batch that is bound.

    Sweeps bring one batch at a time, so one piece of memory is enough. What does not fit is unpacked by every pass for itself.

    Args:
        nbytes: Its size; the memory is made when it is first needed, and kept.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._memory: torch.Tensor | None = None
        self._lock = threading.Lock()
        self._is_open = False
        self._taken = 0
        self._weights: dict[Hashable, _Weight] = {}

    def open(self) -> None:
        """Begin with an empty memory: a batch is bound that several passes want."""
        with self._lock:
            self._is_open = True

    def close(self) -> None:
        """Forget all weights: no pass holds the batch any more."""
        with self._lock:
            self._is_open, self._taken = False, 0
            self._weights.clear()

    def get(
        self, key: Hashable, nbytes: int, unpack: Callable[[torch.Tensor], None]
    ) -> torch.Tensor | None:
        """The weight ``key`` as uint8 ``[nbytes]``, which ``unpack`` has filled; None if there is no place for it."""
        with self._lock:
            weight = self._weights.get(key)
            if weight is None:
                if not self._is_open or self._taken + nbytes > self._nbytes:
                    return None
                if self._memory is None:
                    self._memory = torch.empty(self._nbytes, dtype=torch.uint8)
                weight = _Weight(self._memory[self._taken : self._taken + nbytes])
                self._taken += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
                self._weights[key] = weight
        return weight.filled(unpack)


# What torch's own memory is aligned to on a CPU.
_ALIGNMENT = 64


class _Weight:
    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._is_filled = False

    def filled(self, unpack: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """The memory, after the first caller has filled it; the others wait."""
        with self._lock:
            if not self._is_filled:
                unpack(self._memory)
                self._is_filled = True
        return self._memory
