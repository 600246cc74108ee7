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

    The order of experts by their scores in ``Eviction`` tells for each use how many cells would have had it: one more than
    experts have a higher score.

    Args:
        experts: Of the layer.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._scores = np.full(experts, -np.inf)  # logarithms, as if no time passed
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
        scores = self._scores[chosen]
        used = np.isfinite(scores)
        higher = (self._scores > scores[used, None]).sum(axis=1)
        np.add.at(self._needed_cells, higher, 1.0)
        # Of an expert that is used for the first time it is not known where it would have been: evenly anywhere behind
        # those that are known.
        seen = int(np.isfinite(self._scores).sum())
        if (first := int((~used).sum())) > 0:
            self._needed_cells[seen:] += first / (self._experts - seen)
        self._scores[chosen] = np.logaddexp2(scores, self._steps / HALF_LIFE)

    def hit_shares(self) -> tuple[float, ...]:
        """For each number of cells, from 0 to all: see ``ExpertUsage``."""
        hits = np.concatenate([[0.0], np.cumsum(self._needed_cells)])
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
