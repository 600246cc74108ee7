"""Plain weights that packed ones are unpacked into once: for all passes of a sweep, or for as long as the plan keeps them."""

import logging
import threading
from collections.abc import Callable, Hashable

import torch

from layerstream.stages.errors import DeviceError
from layerstream.stages.memory import HostMemory

__all__ = ["KeptUnpacked", "UnpackedOnce"]

logger = logging.getLogger(__name__)


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


class KeptUnpacked:
    """The plain weights of a layer batch that the plan keeps unpacked: beside the packed ones, until another plan does not.

    The first sweep does without them: the system takes its time to provide new memory, and a first token should not wait for that.
    """

    def __init__(self, *, is_kept: bool) -> None:
        self._is_kept = is_kept
        self._sweeps = 0
        self._lock = threading.Lock()
        self._weights: dict[str, _Weight] = {}

    def begin_sweep(self) -> None:
        """The batch is bound once more."""
        self._sweeps += 1

    def free(self) -> None:
        """Free the memory; what is still kept is unpacked again. No pass may hold the batch."""
        with self._lock:
            self._weights.clear()

    def keep(self, *, is_kept: bool) -> None:
        """Whether the plan from now on keeps them."""
        self._is_kept = is_kept
        if not is_kept:
            self.free()

    def get(
        self, name: str, nbytes: int, unpack: Callable[[torch.Tensor], None]
    ) -> torch.Tensor | None:
        """The weight ``name`` as uint8 ``[nbytes]``, which ``unpack`` has filled; None if it is not kept."""
        if not self._is_kept or self._sweeps <= 1:
            return None
        with self._lock:
            weight = self._weights.get(name)
            if weight is None:
                try:
                    weight = _Weight(HostMemory(nbytes).tensor)
                except DeviceError as error:
                    logger.warning("%s is unpacked in every sweep: %s", name, error)
                    self._is_kept = False
                    return None
                self._weights[name] = weight
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
