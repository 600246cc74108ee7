"""Which experts tokens were routed to: recorded one by one on demand, and in curves that say what more cells would have hit."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from layerstream.stages.experts.eviction import HALF_LIFE

__all__ = ["STEP_TOKENS", "ExpertDemand", "ExpertRoute", "ExpertUsage", "UsageCounter"]

# Passes of at most so many tokens count as decoding: longer ones do not go through the cells of a layer alone.
STEP_TOKENS = 8
# Fewer passes say nothing about the next ones.
_LEAST_PASSES = 16


class ExpertDemand(NamedTuple):
    """What one pass has asked one layer for."""

    set_index: int
    tokens: int
    experts: tuple[int, ...]
    """Ascending."""


class ExpertRoute:
    """The demands of all passes since it was begun, in order, as many as it may keep.

    Args:
        most: Demands that are kept; later ones are only counted.

    Attributes:
        demands: What was kept.
        dropped: How many were not.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.demands: list[ExpertDemand] = []
        self.dropped = 0

    def add(self, demand: ExpertDemand) -> None:
        """Keep ``demand`` if there is room."""
        if len(self.demands) < self.most:
            self.demands.append(demand)
        else:
            self.dropped += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUsage:
    """How the tokens of one layer choose experts, as past passes have shown it."""

    tokens: tuple[float, ...]
    """Numbers of tokens in a pass, ascending."""
    distinct: tuple[float, ...]
    """For each, how many experts they were routed to on average."""
    hit_shares: tuple[float, ...]
    """For each number of cells, from 0 to all, the share of a decoding step's experts that would have been in them."""

    def distinct_of(self, tokens: int, *, experts: int) -> float:
        """Experts that ``tokens`` are expected to need, of ``experts``.

        Each further token needs new ones with the same share of those that are left: as between two known numbers, so
        beyond the last one.
        """
        known = [(0.0, 0.0), *zip(self.tokens, self.distinct, strict=True)]
        left = [np.log(max(1 - found / experts, 1e-3)) for _, found in known]
        sizes = [size for size, _ in known]
        if tokens > sizes[-1]:
            at = left[-1] * tokens / sizes[-1]
        else:
            at = float(np.interp(tokens, sizes, left))
        return float(experts * (1 - np.exp(at)))


class UsageCounter:
    """Counts how one layer's experts are used. Not thread-safe.

    The order of experts by their scores in ``Eviction`` tells for each use how many cells would have had it: as many as its
    place in that order.

    Args:
        experts: Of the layer.
    """

    def __init__(self, experts: int) -> None:
        self._scores = np.full(experts, -np.inf)  # logarithms, as if no time passed
        self._uses = np.zeros(experts, dtype=np.int64)
        self._steps = 0
        self._needed_cells = np.zeros(
            experts
        )  # [c - 1]: uses that c cells would have hit, and fewer not
        self._sizes: dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}

    def count(self, demand: ExpertDemand) -> None:
        """Count one pass."""
        size = self._sizes.setdefault(demand.tokens.bit_length(), np.zeros(3))
        size += (1, demand.tokens, len(demand.experts))
        if demand.tokens > STEP_TOKENS:
            return
        self._steps += 1
        chosen = np.array(demand.experts)
        ranks = np.empty(len(self._scores), dtype=np.int64)
        ranks[np.argsort(self._scores, kind="stable")[::-1]] = np.arange(len(ranks))
        np.add.at(self._needed_cells, ranks[chosen[self._uses[chosen] > 0]], 1.0)
        self._scores[chosen] = np.logaddexp2(self._scores[chosen], self._steps / HALF_LIFE)
        self._uses[chosen] += 1

    def hit_shares(self) -> tuple[float, ...]:
        """For each number of cells, from 0 to all: see ``ExpertUsage``.

        An expert that was not used before is next with the probability of Good and Turing: the share of uses whose expert was
        used only once. It may be any of those.
        """
        new = (self._uses == 1).sum() / max(self._uses.sum(), 1)
        needed = self._needed_cells * (1 - new) / max(self._needed_cells.sum(), 1)
        never = self._uses == 0
        places = never.sum() or len(needed)
        needed[-places:] += new / places
        hits = np.concatenate([[0.0], np.cumsum(needed)])
        return tuple(np.round(hits / max(hits[-1], 1e-9), 4).tolist())

    def usage(self) -> ExpertUsage | None:
        """What was counted; None if that is too little to tell."""
        if self._steps < _LEAST_PASSES:
            return None
        means = sorted((tokens / n, experts / n) for n, tokens, experts in self._sizes.values())
        return ExpertUsage(
            tokens=tuple(tokens for tokens, _ in means),
            distinct=tuple(experts for _, experts in means),
            hit_shares=self.hit_shares(),
        )
