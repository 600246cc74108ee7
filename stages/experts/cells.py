"""Cells of equal size, least recently used first to be used again. Not thread-safe: the store locks."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future

import torch

from layerstream.stages.batch import TensorView
from layerstream.stages.memory import strides_of

__all__ = ["Cell", "CellRegion"]


class Cell:
    """A piece of memory that holds one expert.

    Attributes:
        number: Its place in the region.
        tensor: Its bytes, uint8 ``[cell_bytes]``.
        key: What it holds; None if nothing.
        users: How many passes hold it, and 1 more while it is loaded: it is not used again meanwhile.
        read_ahead: Whether it was read before a pass asked for it, and none has since.
        loaded: Done when its bytes have arrived, or has the error.
    """

    __slots__ = ("key", "loaded", "number", "read_ahead", "tensor", "users")

    def __init__(self, number: int, tensor: torch.Tensor) -> None:
        self.number = number
        self.tensor = tensor
        self.key: Hashable | None = None
        self.users = 0
        self.read_ahead = False
        self.loaded: Future[None] = Future()


class CellRegion:
    """Cells that lie one behind the other, so that they can be addressed as one tensor.

    Args:
        memory: uint8 ``[count * cell_bytes]``.
        cell_bytes: Of one cell.
    """

    def __init__(self, memory: torch.Tensor, cell_bytes: int) -> None:
        self.memory = memory
        self.cell_bytes = cell_bytes
        self.count = memory.numel() // cell_bytes if cell_bytes else 0
        self._free = [
            Cell(number, memory.narrow(0, number * cell_bytes, cell_bytes))
            for number in reversed(range(self.count))
        ]
        self._cells: OrderedDict[Hashable, Cell] = OrderedDict()  # least recently used first

    @property
    def free_count(self) -> int:
        """How many cells hold nothing."""
        return len(self._free)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._cells

    def strided(self, view: TensorView) -> torch.Tensor:
        """The tensor ``view`` of all cells, ``[count, *view.shape]``: contiguous within a cell."""
        dtype: torch.dtype = getattr(torch, view.dtype)
        start = self.memory.storage_offset() + view.offset
        return torch.empty(0, dtype=dtype, device=self.memory.device).set_(
            self.memory.untyped_storage(),
            start // dtype.itemsize,
            (self.count, *view.shape),
            (self.cell_bytes // dtype.itemsize, *strides_of(view.shape)),
        )

    def take(self, keys: Sequence[Hashable]) -> tuple[list[Cell], list[Cell]] | None:
        """Cells for ``keys``, held for the caller: all of them, or None if not all can be had now.

        Returns:
            The cells in the order of ``keys``, and those among them that have to be loaded, which are held for that too: the
            caller may give up while reads still write into them.
        """
        missing = [key for key in keys if key not in self._cells]
        if len(missing) > len(self._free):
            wanted = set(keys)
            idle = sum(not cell.users for key, cell in self._cells.items() if key not in wanted)
            if len(missing) > len(self._free) + idle:
                return None
        # Those that are there first: a cell that this very call needs must not be taken for another one.
        for key in keys:
            if (cell := self._cells.get(key)) is not None:
                cell.users += 1
                self._cells.move_to_end(key)
        new = []
        for key in missing:
            cell = self._free.pop() if self._free else self._evict()
            cell.key, cell.users, cell.loaded = key, 2, Future()
            cell.read_ahead = False
            self._cells[key] = cell
            new.append(cell)
        return [self._cells[key] for key in keys], new

    def release(self, cell: Cell) -> None:
        """One pass less holds ``cell``, or it is loaded."""
        cell.users -= 1
        if not cell.users and cell.key is None:
            self._free.append(cell)

    def forget(self, cell: Cell) -> None:
        """Loading ``cell`` has failed: nobody finds it any more; its last ``release`` frees it."""
        del self._cells[cell.key]
        cell.key = None

    def _evict(self) -> Cell:
        key = next(key for key, cell in self._cells.items() if not cell.users)
        return self._cells.pop(key)
