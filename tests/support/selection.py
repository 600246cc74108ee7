"""Tests with many combinations of parameters: the default run takes some of them, ``--extended`` takes all."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations, product
from typing import Any

import pytest

__all__ = ["covering"]


def covering(**factors: Mapping[str, Any] | Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by all combinations of the values of ``factors``.

    The default run takes so many that each value occurs, and each two values of three factors or more occur together.

    Args:
        factors: Values for each parameter; of a mapping, the keys are their names.
    """
    named = [_named(values) for values in factors.values()]
    chosen = _chosen([len(values) for values in named])
    marks = {False: [pytest.mark.extended], True: []}
    return pytest.mark.parametrize(
        tuple(factors),
        [
            pytest.param(
                *(value for _, value in combination),
                id="-".join(name for name, _ in combination),
                marks=marks[places in chosen],
            )
            for places, combination in zip(
                product(*(range(len(values)) for values in named)), product(*named), strict=True
            )
        ],
    )


def _named(values: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Any]]:
    if isinstance(values, Mapping):
        return list(values.items())
    return [
        (getattr(value, "__name__", str(value)).removeprefix("torch."), value) for value in values
    ]


def _chosen(sizes: list[int]) -> set[tuple[int, ...]]:
    """Few combinations of places that hold all values, or all pairs of them; greedy, and the same in each process."""
    together = min(2, max(1, len(sizes) - 1))

    def held(places: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(places), together))

    rest = [*product(*map(range, sizes))]
    missing = set().union(*map(held, rest))
    chosen: set[tuple[int, ...]] = set()
    uses: Counter[tuple[int, int]] = Counter()
    while missing:
        best = max(
            rest,
            key=lambda each: (len(held(each) & missing), -sum(uses[u] for u in enumerate(each))),
        )
        chosen.add(best)
        missing -= held(best)
        uses.update(enumerate(best))
    return chosen
