"""Which expert makes way. Not thread-safe: the store locks.

Two ways are known, and which one is better depends on the model and on how many cells there are: one list of least recently
used experts over all layers, which hits nothing while the cells are fewer than what one token needs of all layers together;
and a list for each layer, which wastes cells on layers whose tokens agree. So both are simulated, by names alone, and
whoever missed less of late decides.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Eviction", "ExpertKey", "LruModel"]

# Misses count for about so many demands.
_MEMORY = 2048


class ExpertKey(NamedTuple):
    """An expert of a model."""

    set_index: int
    expert: int


class LruModel:
    """What lists of least recently used experts would keep.

    Args:
        quotas: How many experts each layer's list keeps, or how many the single list of all layers.
    """

    def __init__(self, quotas: Mapping[int, int] | int) -> None:
        self._quotas = quotas
        self._lists: defaultdict[int, OrderedDict[ExpertKey, None]] = defaultdict(OrderedDict)

    def use(self, keys: Sequence[ExpertKey]) -> tuple[int, list[ExpertKey]]:
        """One layer's demand: how many of ``keys`` were kept, and which experts are not any more."""
        quotas, layer = self._quotas, keys[0].set_index
        kept, quota = (
            (self._lists[0], quotas)
            if isinstance(quotas, int)
            else (self._lists[layer], quotas[layer])
        )
        hits = sum(key in kept for key in keys)
        for key in keys:  # all of them before anything makes way: they are needed together
            kept[key] = None
            kept.move_to_end(key)
        return hits, [kept.popitem(last=False)[0] for _ in range(len(kept) - quota)]


class Eviction:
    """Names the experts that make way.

    Args:
        quotas: Cells of each layer if every layer has its own; all together they are what there is.
    """

    def __init__(self, quotas: Mapping[int, int]) -> None:
        self._models = (LruModel(sum(quotas.values())), LruModel(quotas))
        self._misses = [0.0, 0.0]
        # Experts in memory that each model would not keep, those first that it gave up first.
        self._surplus: tuple[OrderedDict[ExpertKey, None], ...] = (OrderedDict(), OrderedDict())
        self._passing: OrderedDict[ExpertKey, None] = OrderedDict()

    def use(self, keys: Sequence[ExpertKey], *, in_memory: Container[ExpertKey]) -> None:
        """A pass needs ``keys``, of one layer, and is likely to need them again."""
        for number, (model, surplus) in enumerate(zip(self._models, self._surplus, strict=True)):
            hits, given_up = model.use(keys)
            self._misses[number] *= 1 - 1 / _MEMORY
            self._misses[number] += len(keys) - hits
            for key in keys:
                surplus.pop(key, None)
            surplus.update((key, None) for key in given_up if key in in_memory)
        for key in keys:
            self._passing.pop(key, None)

    def passes(self, key: ExpertKey) -> None:
        """``key`` is only passing through: a long prompt needs it once."""
        self._passing[key] = None

    def gone(self, key: ExpertKey) -> None:
        """``key`` is not in memory any more."""
        self._passing.pop(key, None)
        for surplus in self._surplus:
            surplus.pop(key, None)

    def candidates(self) -> Iterable[ExpertKey]:
        """Experts to make way, the best ones first, some of them twice; any others come after these."""
        yield from self._passing
        better = 0 if self._misses[0] <= self._misses[1] else 1
        for number in (better, 1 - better):
            yield from self._surplus[number]
