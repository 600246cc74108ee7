"""What is counted and recorded of how tokens choose experts, and what other ways of keeping them would have hit."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.experts import RandomExperts

from layerstream.pipeline.planning.expert_replay import (
    optimal_hits,
    replay,
)
from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.eviction import Eviction, ExpertKey
from layerstream.stages.experts.usage import ExpertDemand, ExpertRoute, UsageCounter

EXPERTS = 10


@st.composite
def routes(draw: st.DrawFn) -> list[ExpertDemand]:
    chosen = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=3)
    layers = draw(st.integers(1, 3))
    return [
        ExpertDemand(layer, 1, tuple(sorted(draw(chosen))))
        for _ in range(draw(st.integers(1, 12)))
        for layer in range(layers)
    ]


@given(routes(), st.integers(1, 30))
def test_no_way_hits_more_than_the_best_and_with_cells_for_all_everything_returns(
    route: list[ExpertDemand], cells: int
) -> None:
    found = replay(route, cells=cells)
    assert found.quota_lru_hits <= found.optimal_hits <= found.wanted
    assert found.global_lru_hits <= found.optimal_hits
    everything = replay(route, cells=3 * EXPERTS)
    distinct = {(d.set_index, expert) for d in route for expert in d.experts}
    for hits in (everything.quota_lru_hits, everything.global_lru_hits, everything.optimal_hits):
        assert hits == found.wanted - len(distinct)
    assert optimal_hits(route, cells=cells + 1) >= found.optimal_hits


def test_beladys_optimum_is_that_of_a_known_example() -> None:
    """The reference string of the textbooks, with three frames: 9 faults if a missed page must be kept, 8 if it need not."""
    string = (7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1)
    found = replay([ExpertDemand(0, 1, (page,)) for page in string], cells=3)
    assert found.wanted - found.global_lru_hits == 12
    assert found.wanted - found.optimal_hits <= 9
    assert found.wanted - found.optimal_hits > len(set(string))


def hits(demands: Sequence[ExpertDemand], *, cells: int) -> int:
    """What cells of a single layer hit if ``Eviction`` decides."""
    eviction, memory, found = Eviction(), set[ExpertKey](), 0
    for demand in demands:
        keys = [ExpertKey(0, expert) for expert in demand.experts]
        eviction.use(keys)
        missing = [key for key in keys if key not in memory]
        found += len(keys) - len(missing)
        surplus = max(0, len(memory) + len(missing) - cells)
        memory -= set(eviction.make_way(surplus, idle=lambda key, keys=keys: key not in keys))
        for key in missing:
            eviction.added(key, passing=False)
            memory.add(key)
    return found


@pytest.mark.parametrize("skew", [1.0, 1.1, 1.3])
def test_the_curve_is_what_so_many_cells_hit(skew: float) -> None:
    route = [each for each in demands(3, passes=2000, skew=skew) if each.set_index == 0]
    counter = UsageCounter(16)
    for demand in route:
        counter.count(demand)
    curve = counter.hit_shares()
    assert (curve[0], curve[16]) == (0, pytest.approx(1))
    assert list(curve) == sorted(curve)
    wanted = sum(len(demand.experts) for demand in route)
    for cells in range(6, 17):  # with fewer, what is needed now displaces what is needed more often
        assert curve[cells] == pytest.approx(hits(route, cells=cells) / wanted, abs=0.03)


def test_usage_tells_evenly_from_uneven_routing() -> None:
    draw = random.Random(1)
    counters = UsageCounter(EXPERTS), UsageCounter(EXPERTS)
    for counter in counters:
        assert counter.usage() is None
    for _ in range(4000):
        even = draw.sample(range(EXPERTS), 2)
        uneven = {draw.choices(range(EXPERTS), [2.0**-e for e in range(EXPERTS)])[0], 0}
        for counter, chosen in zip(counters, (even, uneven), strict=True):
            counter.count(ExpertDemand(0, 1, tuple(sorted(chosen))))
    for counter in counters:
        counter.count(ExpertDemand(0, 64, tuple(range(9))))
    even_usage, uneven_usage = (counter.usage() for counter in counters)
    assert even_usage is not None
    assert uneven_usage is not None
    for cells in (3, 5, 8):
        assert even_usage.hit_shares[cells] == pytest.approx(cells / EXPERTS, abs=0.03)
        assert uneven_usage.hit_shares[cells] > 0.75
    assert even_usage.distinct_of(1, experts=EXPERTS) == pytest.approx(2)
    assert even_usage.distinct_of(64, experts=EXPERTS) == pytest.approx(9)
    assert 2 < even_usage.distinct_of(8, experts=EXPERTS) < 9
    assert 9 < even_usage.distinct_of(1000, experts=EXPERTS) <= EXPERTS


def test_a_route_keeps_no_more_than_it_may() -> None:
    route = ExpertRoute(most=2)
    for number in range(5):
        route.add(ExpertDemand(0, 1, (number,)))
    assert [demand.experts for demand in route.demands] == [(0,), (1,)]
    assert route.dropped == 3


def demands(seed: int, *, passes: int, skew: float) -> list[ExpertDemand]:
    """Decoding of three layers with 16 experts, of which some layers' tokens use fewer."""
    draw = random.Random(seed)
    found = []
    for _ in range(passes):
        for layer in range(3):
            weights = [skew ** (-expert * (1 + layer)) for expert in range(16)]
            chosen = {draw.choices(range(16), weights)[0] for _ in range(3)}
            found.append(ExpertDemand(layer, 1, tuple(sorted(chosen))))
    return found


@pytest.mark.parametrize("cells", [2, 3, 4, 8, 12])
@pytest.mark.parametrize("skew", [1.0, 1.1, 1.3])
def test_it_reads_no_more_than_the_better_of_one_list_and_one_for_each_layer(
    tmp_path: Path, cells: int, skew: float
) -> None:
    experts, route = (
        RandomExperts(tmp_path, layers=3, experts=16, sizes=(64, 64)),
        demands(1, passes=300, skew=skew),
    )
    with experts.store(cells=cells, shared=0) as store:
        for each in route:
            experts.fetch(store, each.set_index, each.experts)
        counts = store.counts()
    known = replay(route, cells=3 * cells)
    best = known.wanted - max(known.quota_lru_hits, known.global_lru_hits)
    assert counts.wanted == known.wanted
    # Past uses say nothing about the next ones where routing is even: there, they only make layers' shares differ.
    assert counts.wanted - counts.hits <= (1.03 if skew > 1 else 1.08) * best
    assert counts.hits <= known.optimal_hits


@pytest.mark.parametrize("cells", [4, 8])
def test_eight_passes_together_read_what_their_union_needs_once(tmp_path: Path, cells: int) -> None:
    """In each sweep, as long as the cells of all layers hold what one layer's passes need."""
    experts = RandomExperts(tmp_path, layers=3, experts=16, sizes=(64, 64))
    draw, union = random.Random(0), 0
    with experts.store(cells=cells, shared=2) as store:
        for _ in range(30):
            for layer in range(3):
                wanted = [
                    sorted(
                        {draw.choices(range(16), [1.3**-e for e in range(16)])[0] for _ in "123"}
                    )
                    for _ in range(8)
                ]
                union += len({expert for each in wanted for expert in each})
                for each in wanted:
                    experts.fetch(store, layer, each)
        counts = store.counts()
    assert counts.wanted - counts.hits <= 1.05 * union


def test_passes_that_end_midway_do_not_cost_their_layers_the_cells() -> None:
    def hits(midway: int) -> int:
        """In the first of three layers, while passes go through all of them; ``midway`` passes before ended behind it."""
        region, found = CellRegion(torch.zeros(24, dtype=torch.uint8), 1, Eviction()), 0
        first = [each for each in demands(2, passes=midway, skew=1.1) if each.set_index == 0]
        for number, each in enumerate([*first, *demands(3, passes=200, skew=1.1)]):
            keys = [ExpertKey(each.set_index, expert) for expert in each.experts]
            region.demand(keys)
            cells, new = region.take(keys, passing=False) or ([], [])
            if number >= len(first) and each.set_index == 0:
                found += len(cells) - len(new)
            for cell in [*cells, *new]:
                region.release(cell)
        return found

    assert hits(midway=60) > 0.8 * hits(midway=0)


def test_if_every_expert_was_used_once_any_may_be_next() -> None:
    counter = UsageCounter(8)
    for step in range(4):
        counter.count(ExpertDemand(0, 1, (2 * step, 2 * step + 1)))
    assert counter.hit_shares() == pytest.approx([cells / 8 for cells in range(9)])
