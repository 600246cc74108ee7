"""The memory of the expert store: a region of cells for all layers whose experts have one size."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.eviction import Eviction
from layerstream.stages.experts.expert_set import ExpertSet

__all__ = ["CellRegions"]


class CellRegions:
    """Regions for ``sets``, each with the cells of its layers and ``passing_cells`` more, which count as theirs in equal parts.

    Args:
        sets: The experts of each layer, with the layer's quota of cells.
        passing_cells: How many more there are of each size.
        allocate: Makes the memory, uint8 ``[nbytes]``, which is somebody else's to free.

    Attributes:
        regions: All of them.
        of_set: The region of each set; empty when it is closed.
        quotas: For each set, its share of the cells of its region.
    """

    def __init__(
        self,
        sets: Sequence[ExpertSet],
        passing_cells: int,
        allocate: Callable[[int], torch.Tensor],
    ) -> None:
        by_size: defaultdict[int, list[int]] = defaultdict(list)
        for index, each in enumerate(sets):
            by_size[each.cell_bytes].append(index)
        self.quotas = [each.cells for each in sets]
        for members in by_size.values():
            for number in range(passing_cells):
                self.quotas[members[number % len(members)]] += 1
        sizes = {
            nbytes: nbytes * sum(self.quotas[index] for index in members)
            for nbytes, members in by_size.items()
        }
        memory = allocate(sum(sizes.values()))
        self.regions: list[CellRegion] = []
        self.of_set: dict[int, CellRegion] = {}
        begin = 0
        for nbytes, members in by_size.items():
            part = memory.narrow(0, begin, sizes[nbytes])
            self.regions.append(CellRegion(part, nbytes, Eviction()))
            self.of_set |= dict.fromkeys(members, self.regions[-1])
            begin += sizes[nbytes]

    def close(self) -> None:
        """Forget the memory; modules may outlive this, and refer to it."""
        self.regions, self.of_set = [], {}
