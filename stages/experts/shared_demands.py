"""What several passes of a layer need of experts that only pass through: each is read once for all. Not thread-safe: the store locks."""

from collections import defaultdict

from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.eviction import ExpertKey
from layerstream.stages.experts.lease import Lease, SharedDemand

__all__ = ["SharedDemands"]


class SharedDemands:
    """Those of all passes, by layer.

    A pass holds cells of its demand that others have filled until it has computed with them, and waits for further cells only
    when it holds none: so all come to an end.
    """

    def __init__(self) -> None:
        self._demands: defaultdict[int, dict[SharedDemand, CellRegion]] = defaultdict(dict)

    def choose(self, lease: Lease, size: int) -> None:
        """Choose the group of ``lease``, up to ``size`` to be read, if that is of a demand; from now on others read for it too."""
        demand, region = lease.demand, lease.region
        if demand is None:
            return
        if demand not in self._demands[demand.set_index]:
            self._demands[demand.set_index][demand] = region
            for expert in list(demand.wanted):
                _grant(demand, expert, region)
        lease.group = demand.next_group(size)

    def grant(self, set_index: int, expert: int, region: CellRegion) -> bool:
        """``expert`` is being read: whether that is for anybody else."""
        granted = [_grant(each, expert, region) for each in self._demands[set_index]]
        return any(granted)

    def taken(self, lease: Lease) -> None:
        """The lease holds its cells, which its demand need not hold too."""
        if lease.demand is not None:
            for cell in lease.demand.held.values():
                lease.region.release(cell)
            lease.demand.take(lease.group)

    def leave(self, demand: SharedDemand) -> None:
        """The pass needs no more. Nothing if it has left."""
        region = self._demands[demand.set_index].pop(demand, None)
        if region is not None:
            for cell in demand.held.values():
                region.release(cell)
            demand.held.clear()


def _grant(demand: SharedDemand, expert: int, region: CellRegion) -> bool:
    """Hold the cell of ``expert`` for ``demand``, if that wants it and it is in memory."""
    if expert not in demand.wanted or not (
        cell := region.hold(ExpertKey(demand.set_index, expert))
    ):
        return False
    demand.wanted.remove(expert)
    demand.held[expert] = cell
    return True
