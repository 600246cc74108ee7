"""Which expert makes way. Not thread-safe: the store locks.

Those that were used most and most recently stay: an expert's score is the sum of 2^(-age / half-life) over its uses (LRFU: D. Lee
et al., "A spectrum of policies that subsumes the least recently used and least frequently used policies", 2001). A list of
least recently used experts hits nothing while there are fewer cells than one token needs of all layers together, for it comes
round to each only when it has just made way; and routers prefer some experts for longer than a few tokens.
"""

import heapq
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

__all__ = ["HALF_LIFE", "Eviction", "ExpertKey"]

# In demands of a layer. Of 2 to 64, 4 to 8 missed least on replayed routes of 8 and 24 layers, skewed by 0.25 to 1, of one
# request and of several in turn, with all numbers of cells but the largest, where few are missed.
HALF_LIFE = 6
# A layer's lead over others is forgotten in about so many demands.
_LEAD_DEMANDS = 32


class ExpertKey(NamedTuple):
    """An expert of a model."""

    set_index: int
    expert: int


class _Layer:
    """The experts of one layer. Scores are logarithms, as if no time passed: only a use changes their order."""

    def __init__(self) -> None:
        self.now = 0.0  # in half-lives
        # The same, with a limit: passes that end midway have demands of some layers only, and what they add has to go.
        self.lead = 0.0
        self.turn = 0  # the latest, of all layers' turns
        self.scores: dict[ExpertKey, float] = {}
        self.kept: set[ExpertKey] = set()  # in memory, and not only passing through
        self._lowest: list[
            tuple[float, ExpertKey]
        ] = []  # a heap; entries of earlier scores are skipped

    def use(self, key: ExpertKey) -> None:
        past = self.scores.get(key, -math.inf)
        self.scores[key] = max(past, self.now) + math.log2(1 + 2 ** -abs(self.now - past))
        if key in self.kept:
            self.keep(key)

    def keep(self, key: ExpertKey) -> None:
        self.kept.add(key)
        if len(self._lowest) > 2 * len(self.kept) + 64:
            self._lowest = [(self.scores.get(each, -math.inf), each) for each in self.kept]
            heapq.heapify(self._lowest)
        else:
            heapq.heappush(self._lowest, (self.scores.get(key, -math.inf), key))

    def lowest(self) -> tuple[float, int, ExpertKey]:
        """What makes way first, behind what it compares by with those of other layers; infinite if there is nothing."""
        while self._lowest:
            score, key = self._lowest[0]
            if key in self.kept and score == self.scores.get(key, -math.inf):
                # Its age, and the time until the layer's turn comes: later if it has just been.
                return score - self.now - self.lead, -self.turn, key
            heapq.heappop(self._lowest)
        return math.inf, 0, ExpertKey(0, 0)


class Eviction:
    """Names the experts that make way."""

    def __init__(self) -> None:
        self._layers: defaultdict[int, _Layer] = defaultdict(_Layer)
        self._turn = 0
        self._passing: OrderedDict[ExpertKey, None] = OrderedDict()

    def score(self, key: ExpertKey) -> float:
        """Comparable with that of other experts of the layer: higher if it is more likely to be needed again."""
        return self._layers[key.set_index].scores.get(key, -math.inf)

    def use(self, keys: Iterable[ExpertKey]) -> None:
        """A pass needs ``keys``, of one layer."""
        self._turn += 1
        for key in keys:
            layer = self._layers[key.set_index]
            if layer.turn < self._turn:
                layer.now, layer.turn = layer.now + 1 / HALF_LIFE, self._turn
                layer.lead += 1 / HALF_LIFE - layer.lead / _LEAD_DEMANDS
            if key in self._passing:
                del self._passing[key]
                layer.kept.add(key)
            layer.use(key)

    def added(self, key: ExpertKey, *, passing: bool) -> None:
        """``key`` is in memory now; if it is only ``passing`` through, it makes way first until it is used again."""
        if passing:
            self._passing[key] = None
        else:
            self._layers[key.set_index].keep(key)

    def gone(self, key: ExpertKey) -> None:
        """``key`` is not in memory any more."""
        self._passing.pop(key, None)
        self._layers[key.set_index].kept.discard(key)

    def make_way(self, count: int, *, idle: Callable[[ExpertKey], bool]) -> list[ExpertKey]:
        """Take the ``count`` experts out of memory that make way, of those that are ``idle``, which so many must be."""
        found = [key for key in self._passing if idle(key)][:count]
        busy = list[ExpertKey]()
        while len(found) < count:
            *_, key = min(layer.lowest() for layer in self._layers.values())
            self.gone(key)
            (found if idle(key) else busy).append(key)
        for key in busy:
            self._layers[key.set_index].keep(key)
        for key in found:
            self.gone(key)
        return found
