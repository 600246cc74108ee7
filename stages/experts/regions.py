"""The memory of the expert store: a region of cells for all layers whose experts have one size."""

from collections import defaultdict
from collections.abc import Sequence

from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.eviction import Eviction
from layerstream.stages.experts.expert_set import ExpertSet
from layerstream.stages.memory import HostMemory

__all__ = ["CellRegions"]


class CellRegions:
    """Regions for ``sets``, each with the cells of its layers and ``passing_cells`` more, which count as theirs in equal parts.

    Attributes:
        regions: All of them.
        of_set: The region of each set; empty when it is closed.
        quotas: For each set, its share of the cells of its region.
    """

    def __init__(self, sets: Sequence[ExpertSet], passing_cells: int) -> None:
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
        self._memory = HostMemory(sum(sizes.values()))
        self.regions: list[CellRegion] = []
        self.of_set: dict[int, CellRegion] = {}
        begin = 0
        for nbytes, members in by_size.items():
            memory = self._memory.tensor.narrow(0, begin, sizes[nbytes])
            self.regions.append(CellRegion(memory, nbytes, Eviction()))
            self.of_set |= dict.fromkeys(members, self.regions[-1])
            begin += sizes[nbytes]

    def close(self) -> None:
        """Free the memory; modules may outlive this, and refer to it."""
        self.regions, self.of_set = [], {}
        self._memory.close()
