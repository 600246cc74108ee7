"""Leases of cells: what a pass holds while it computes with experts."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from layerstream.stages.errors import copy_of
from layerstream.stages.experts.cells import Cell, CellRegion
from layerstream.stages.experts.eviction import ExpertKey

__all__ = ["ExpertGroup", "Lease", "SharedDemand", "WaitFor", "groups_of"]

WaitFor = Callable[[Future[Any]], object]
"""Blocks until a future is done; may raise instead, for who leaves what it waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroup:
    """Experts of a layer that are computed with together, in cells of one region."""

    set_index: int
    experts: tuple[int, ...]
    passing: bool
    """They are more than the layer's quota, so their cells are the first to be used again."""

    @property
    def keys(self) -> list[ExpertKey]:
        """The same, among experts of all layers."""
        return [ExpertKey(self.set_index, expert) for expert in self.experts]


def groups_of(
    set_index: int, experts: Sequence[int], size: int, *, passing: bool
) -> list[ExpertGroup]:
    """``experts`` in groups of so many, each ascending."""
    return [
        ExpertGroup(
            set_index=set_index, experts=tuple(sorted(experts[at : at + size])), passing=passing
        )
        for at in range(0, len(experts), size)
    ]


class SharedDemand:
    """Experts that only pass through, for a pass: whoever reads one of them fills the cell for all passes that need it.

    Args:
        set_index: The layer.
        experts: Ascending.

    Attributes:
        wanted: Those that the pass still has to get.
        held: Cells that it holds already, and has not computed with.
    """

    def __init__(self, set_index: int, experts: Sequence[int]) -> None:
        self.set_index = set_index
        self.wanted = list(experts)
        self.held: dict[int, Cell] = {}

    def next_group(self, size: int) -> ExpertGroup:
        """What is computed with next: what the pass holds, or so many of the others."""
        experts = sorted(self.held) or self.wanted[:size]
        return ExpertGroup(set_index=self.set_index, experts=tuple(experts), passing=True)

    def take(self, group: ExpertGroup) -> None:
        """The pass has got ``group``."""
        self.held.clear()
        self.wanted = [each for each in self.wanted if each not in group.experts]


class Lease:
    """Cells that a pass holds: nobody else's bytes come into them before ``release``.

    Args:
        group: What is in them, or on its way.
        region: Where they are.
        on_wait: Gets the seconds that the pass has waited for bytes.
        on_release: Gets the lease whose cells are to be given back.
        demand: The ``SharedDemand`` that the group is chosen from when the cells are taken, if it is.
    """

    def __init__(
        self,
        group: ExpertGroup,
        region: CellRegion,
        *,
        on_wait: Callable[[float], None],
        on_release: Callable[["Lease"], None],
        demand: SharedDemand | None = None,
    ) -> None:
        self._cells: list[Cell] = []
        self._on_wait = on_wait
        self._on_release = on_release
        self.group = group
        self.demand = demand
        self.region = region

    @property
    def cells(self) -> list[int]:
        """The numbers of the cells in the region, in the order of the group's experts; none before they are taken."""
        return [cell.number for cell in self._cells]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The bytes of those cells, uint8 ``[cell_bytes]`` each."""
        return [cell.tensor for cell in self._cells]

    def hold(self, cells: Sequence[Cell]) -> None:
        """For the store: these are the pass's, in the order of the group's experts."""
        self._cells = list(cells)

    def give_up(self) -> list[Cell]:
        """For the store: the cells, which are the pass's no more."""
        cells, self._cells = self._cells, []
        return cells

    @property
    def ready(self) -> bool:
        """Whether all bytes are there."""
        return all(cell.loaded.done() for cell in self._cells)

    def wait(self, wait_for: WaitFor = Future.exception) -> None:
        """Block until all bytes are there.

        Args:
            wait_for: How.

        Raises:
            ReadError: A read has failed.
            ClosedError: The store was closed.
        """
        began = time.perf_counter()
        for cell in self._cells:
            wait_for(cell.loaded)
            if (error := cell.loaded.exception()) is not None:
                raise copy_of(error)
        self._on_wait(time.perf_counter() - began)

    def release(self) -> None:
        """Give the cells back; the work that reads them is done. May be called again."""
        self._on_release(self)
