"""Experts that pass through the store for several passes at once."""

import time
from pathlib import Path

import pytest
from support.experts import RandomExperts, idle_cells

from layerstream.stages.experts.lease import SharedDemand


@pytest.fixture
def experts(tmp_path: Path) -> RandomExperts:
    return RandomExperts(tmp_path)


def test_what_passes_through_is_read_once_for_all_who_need_it(experts: RandomExperts) -> None:
    with experts.store(cells=0, shared=2) as store:
        demands = [SharedDemand(0, [0, 1, 2]), SharedDemand(0, [1, 2, 3])]
        leases = [store.lease(demand.next_group(1), demand) for demand in demands]
        for lease in leases:  # the second one comes when the first has read an expert
            assert store.take(lease, wait_for=None)
        waiting = store.lease(demands[0].next_group(1), demands[0])
        assert waiting.group.experts == leases[1].group.experts == (1,)
        assert store.take(waiting, wait_for=None)  # though there are no more cells
        for lease in (*leases, waiting):
            lease.wait()
            experts.check(lease)
            lease.release()
        last = store.lease(demands[1].next_group(1), demands[1])
        assert store.take(last)
        assert demands[0].held
        for demand in demands:  # one of them leaves with a cell that it has not computed with
            store.leave(demand)
        last.release()
        assert store.counts().wanted - store.counts().hits == 3
        deadline = time.monotonic() + 10
        (region,) = store._cells.regions
        while idle_cells(region) < region.count and time.monotonic() < deadline:
            time.sleep(0.001)
        assert idle_cells(region) == region.count
