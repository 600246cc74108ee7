"""Replays which experts passes have asked for, with other ways to decide which of them stay in memory. Pure."""

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from layerstream.stages.experts.usage import ExpertDemand

__all__ = ["Replay", "global_lru_hits", "optimal_hits", "quota_lru_hits", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Hits of some ways to use the same number of cells, on one route."""

    wanted: int
    """Experts that passes have asked for, each layer of each pass by itself."""
    cells: int
    quota_lru_hits: int
    """With equal quotas of cells for each layer, least recently used experts making way."""
    global_lru_hits: int
    """With one list of least recently used experts over all layers."""
    optimal_hits: int
    """With what is needed last making way, over all layers: no way can do better, and none knows the future."""

    def share(self, hits: int) -> float:
        """``hits`` as a share of what was wanted."""
        return hits / self.wanted if self.wanted else 0.0


def replay(demands: Sequence[ExpertDemand], *, cells: int) -> Replay:
    """What ``cells`` for all layers together would have hit, from empty ones on."""
    return Replay(
        wanted=sum(len(demand.experts) for demand in demands),
        cells=cells,
        quota_lru_hits=quota_lru_hits(demands, cells=cells),
        global_lru_hits=global_lru_hits(demands, cells=cells),
        optimal_hits=optimal_hits(demands, cells=cells),
    )


def quota_lru_hits(demands: Sequence[ExpertDemand], *, cells: int) -> int:
    """Hits with an equal share of ``cells`` for each layer, one more for the first ones if it does not come out even."""
    layers = sorted({demand.set_index for demand in demands})
    hits = 0
    for number, layer in enumerate(layers):
        quota = cells // len(layers) + (number < cells % len(layers))
        hits += _lru_hits((d for d in demands if d.set_index == layer), cells=quota)
    return hits


def global_lru_hits(demands: Iterable[ExpertDemand], *, cells: int) -> int:
    """Hits with one list of all layers' experts."""
    return _lru_hits(demands, cells=cells)


def _lru_hits(demands: Iterable[ExpertDemand], *, cells: int) -> int:
    kept: OrderedDict[Hashable, None] = OrderedDict()
    hits = 0
    for demand in demands:
        keys = [(demand.set_index, expert) for expert in demand.experts]
        hits += sum(key in kept for key in keys)
        for key in keys:  # all of one demand before anything makes way: it needs them together
            kept[key] = None
            kept.move_to_end(key)
        while len(kept) > cells:
            kept.popitem(last=False)
    return hits


def optimal_hits(demands: Sequence[ExpertDemand], *, cells: int) -> int:
    """Hits if always the expert that is needed last makes way, or is not kept at all (Belady's optimum)."""
    uses = [(d.set_index, expert) for d in demands for expert in d.experts]
    later: dict[Hashable, int] = {}
    following = [0] * len(uses)
    for at in range(len(uses) - 1, -1, -1):
        following[at] = later.get(uses[at], len(uses) + at)
        later[uses[at]] = at
    kept: dict[Hashable, int] = {}  # with the next use of each
    furthest: list[tuple[int, Hashable]] = []
    hits = 0
    for at, key in enumerate(uses):
        hits += key in kept
        kept[key] = following[at]
        heapq.heappush(furthest, (-following[at], key))
        while len(kept) > cells:
            use, last = heapq.heappop(furthest)
            if kept.get(last) == -use:
                del kept[last]
    return hits
