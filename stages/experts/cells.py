"""Cells of equal size, each of which holds one expert. Not thread-safe: the store locks."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future

import torch

from layerstream.stages.batch import TensorView
from layerstream.stages.devices.protocol import Device, Event
from layerstream.stages.experts.eviction import Eviction, ExpertKey
from layerstream.stages.memory import strides_of

__all__ = ["Cell", "CellRegion", "queued_work"]


class Cell:
    """A piece of memory that holds one expert.

    Attributes:
        number: Its place in the region.
        tensor: Its bytes, uint8 ``[cell_bytes]``.
        key: What it holds; None if nothing.
        users: How many passes hold it, and 1 more while it is loaded: it is not used again meanwhile.
        read_ahead: Whether it was read before a pass asked for it, and none has since.
        loaded: Done when its bytes have arrived, or has the error.
        readers: On a device, the event behind the last work of each stream that reads it.
    """

    __slots__ = ("key", "loaded", "number", "read_ahead", "readers", "tensor", "users")

    def __init__(self, number: int, tensor: torch.Tensor) -> None:
        self.number = number
        self.tensor = tensor
        self.key: ExpertKey | None = None
        self.users = 0
        self.read_ahead = False
        self.loaded: Future[None] = Future()
        self.readers: dict[Hashable, Event] = {}


class CellRegion:
    """Cells that lie one behind the other, so that they can be addressed as one tensor.

    Args:
        memory: uint8 ``[count * cell_bytes]``.
        cell_bytes: Of one cell.
        eviction: Decides which experts make way.
    """

    def __init__(self, memory: torch.Tensor, cell_bytes: int, eviction: Eviction) -> None:
        self.memory = memory
        self.cell_bytes = cell_bytes
        self.count = memory.numel() // cell_bytes if cell_bytes else 0
        self._eviction = eviction
        self._free = [
            Cell(number, memory.narrow(0, number * cell_bytes, cell_bytes))
            for number in reversed(range(self.count))
        ]
        self._strided: dict[TensorView, torch.Tensor] = {}
        self._cells: dict[ExpertKey, Cell] = {}
        self._idle = 0  # of those in ``_cells``, how many nobody holds

    @property
    def free_count(self) -> int:
        """How many cells hold nothing."""
        return len(self._free)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._cells

    def demand(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """A pass needs ``keys``, of one layer: in the order in which they should stay, those in memory before others."""
        self._eviction.use(keys)
        return sorted(
            keys, key=lambda key: (key in self._cells, self._eviction.score(key)), reverse=True
        )

    def strided(self, view: TensorView) -> torch.Tensor:
        """The tensor ``view`` of all cells, ``[count, *view.shape]``: contiguous within a cell. Made once, for all layers."""
        made = self._strided.get(view)
        if made is None:
            dtype: torch.dtype = getattr(torch, view.dtype)
            start = self.memory.storage_offset() + view.offset
            with torch.inference_mode(mode=False):  # for any later use
                made = torch.empty(0, dtype=dtype, device=self.memory.device).set_(
                    self.memory.untyped_storage(),
                    start // dtype.itemsize,
                    (self.count, *view.shape),
                    (self.cell_bytes // dtype.itemsize, *strides_of(view.shape)),
                )
            self._strided[view] = made
        return made

    def take(
        self, keys: Sequence[ExpertKey], *, passing: bool
    ) -> tuple[list[Cell], list[Cell]] | None:
        """Cells for ``keys``, held for the caller: all of them, or None if not all can be had now.

        Args:
            keys: Experts of one layer.
            passing: They are not likely to be needed again soon, and make way for others first.

        Returns:
            The cells in the order of ``keys``, and those among them that have to be loaded, which are held for that too: the
            caller may give up while reads still write into them.
        """
        there = [cell for key in keys if (cell := self._cells.get(key)) is not None]
        missing = [key for key in keys if key not in self._cells]
        if len(missing) > len(self._free) + self._idle - sum(not cell.users for cell in there):
            return None
        # Those that are there first: a cell that this very call needs must not be taken for another one.
        for cell in there:
            self._idle -= not cell.users
            cell.users += 1
        self._make_room(len(missing))
        new = []
        for key in missing:
            cell = self._free.pop()
            cell.key, cell.users, cell.loaded = key, 2, Future()
            cell.read_ahead = False
            self._cells[key] = cell
            self._eviction.added(key, passing=passing)
            new.append(cell)
        return [self._cells[key] for key in keys], new

    def missing(self, set_index: int, experts: int, most: int) -> tuple[int, ...]:
        """The first of a layer's experts that are not in memory."""
        every = (each for each in range(experts) if ExpertKey(set_index, each) not in self._cells)
        return tuple(itertools.islice(every, most))

    def hold(self, key: ExpertKey) -> Cell | None:
        """The cell of ``key``, held for one pass more; None if it is not in memory."""
        cell = self._cells.get(key)
        if cell is not None:
            self._idle -= not cell.users
            cell.users += 1
        return cell

    def release(self, cell: Cell) -> None:
        """One pass less holds ``cell``, or it is loaded."""
        cell.users -= 1
        if not cell.users and cell.key is None:
            self._free.append(cell)
        elif not cell.users:
            self._idle += 1

    def forget(self, cell: Cell) -> None:
        """Loading ``cell`` has failed: nobody finds it any more; its last ``release`` frees it."""
        assert cell.key is not None  # noqa: S101
        del self._cells[cell.key]
        self._eviction.gone(cell.key)
        cell.key = None

    def _make_room(self, count: int) -> None:
        """Free cells that nobody holds until ``count`` are free."""
        wanted = count - len(self._free)
        if wanted <= 0:
            return
        for key in self._eviction.make_way(wanted, idle=lambda key: not self._cells[key].users):
            cell = self._cells.pop(key)
            self._idle -= 1
            cell.key = None
            self._free.append(cell)


def queued_work(device: Device) -> Mapping[Hashable, Event]:
    """The event behind what the calling thread has queued on ``device``."""
    try:
        return {device.stream(): device.record()}
    except Exception:
        device.drain()  # nothing else tells when that work is done
        raise
