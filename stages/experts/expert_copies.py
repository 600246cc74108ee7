"""Copies of experts from cells in host memory into those of a device."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from layerstream.stages.devices.protocol import Device
from layerstream.stages.experts.cells import Cell
from layerstream.stages.experts.expert_set import ExpertSet
from layerstream.stages.experts.lease import ExpertGroup
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.threads import Threads

__all__ = ["ExpertCopies"]


class ExpertCopies:
    """Threads that copy experts, each of which a store in host memory reads if it does not hold it.

    An expert is in both memories afterwards, until it makes way in either.

    Args:
        host: The store; closed with this object.
        device: Where the other cells are.
        threads: How many experts are on their way at once: each of them holds a cell of ``host``.
    """

    def __init__(self, host: ExpertStore, device: Device, *, threads: int) -> None:
        self.host = host
        self._device = device
        self._lock = threading.Lock()
        self._passing: dict[tuple[int, int], bool] = {}  # by layer and expert, as the host has it
        self._threads = Threads("expert copies", threads)

    @property
    def nbytes(self) -> int:
        """How many bytes have been read from files so far."""
        return self.host.counts().read_bytes

    def demand(self, set_index: int, experts: Sequence[int]) -> None:
        """Let the host know of all that a pass needs of it, since what stays there is decided by demands, not by single experts."""
        groups = self.host.groups(set_index, experts) if experts else []
        with self._lock:
            for group in groups:
                for expert in group.experts:
                    self._passing[set_index, expert] = group.passing

    def begin(self, cell: Cell, experts: ExpertSet, expert: int) -> list[Future[None]]:  # noqa: ARG002 - by its key
        """Begin to bring ``expert`` into ``cell``."""
        assert cell.key is not None  # noqa: S101
        return [self._threads.submit(self._copy, cell, cell.key.set_index, expert)]

    def _copy(self, cell: Cell, set_index: int, expert: int) -> None:
        with self._lock:
            passing = self._passing.get((set_index, expert), True)  # True: it is read ahead
        group = ExpertGroup(set_index=set_index, experts=(expert,), passing=passing)
        lease = self.host.lease(group)
        try:
            # Of all that is waited for here, nothing waits for a cell of the device.
            self.host.take(lease)
            lease.wait()
            (source,) = lease.tensors
            readers = dict(cell.readers)
            # Waited for here, so that all streams may compute with it, and the host's cell is free again.
            self._device.copy([(cell.tensor, source)], after=list(readers.values())).synchronize()
            for stream, event in readers.items():
                if (
                    cell.readers.get(stream) is event
                ):  # else a pass that was cancelled has held it since
                    del cell.readers[stream]
        finally:
            lease.release()

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """Fail what is in progress, and wait for none of it any more; whether there is any. See ``Threads``."""
        reading = self.host.abandon(error)
        return self._threads.abandon(error) or reading

    def close(self) -> None:
        """Wait for what has begun and was not abandoned."""
        self._threads.close()
        self.host.close()
