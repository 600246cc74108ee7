"""Reads of experts that have ended before the thread that began them goes on, as on a busy machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import FailingReader, RandomExperts, idle_cells
from support.leaks import nothing_left_behind

from layerstream.stages.errors import ReadError
from layerstream.stages.experts.expert_reads import ExpertReads
from layerstream.stages.experts.lease import ExpertGroup

SECONDS = 10


class EverywhereFailing(dict[tuple[int, int], Exception]):
    def get(self, *_: Any) -> Exception:
        return ReadError("broken")


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def _reads_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = ExpertReads.begin

    def begin_and_end(self: ExpertReads, *given: Any) -> Any:
        reads = begin(self, *given)
        for read in reads:
            read.exception(SECONDS)
        return reads

    monkeypatch.setattr(ExpertReads, "begin", begin_and_end)


@pytest.mark.usefixtures("_reads_end_at_once")
def test_who_takes_an_expert_does_not_wait_for_itself(tmp_path: Path) -> None:
    experts = RandomExperts(tmp_path)
    with experts.store(cells=2, shared=2) as store:
        for layer in (0, 1, 0):
            experts.fetch(store, layer, range(6))
            store.read_ahead(layer, tokens=1000)
        for region in store._cells.regions:
            assert idle_cells(region) == region.count


@pytest.mark.usefixtures("_reads_end_at_once")
def test_a_read_that_has_failed_by_then_fails_its_lease_and_leaves_the_cell(tmp_path: Path) -> None:
    experts = RandomExperts(tmp_path)
    reader = FailingReader(experts.paths)
    with experts.store(reader=reader) as store:
        reader.fail_at = EverywhereFailing()
        lease = store.lease(ExpertGroup(set_index=0, experts=(0, 1), passing=False))
        assert store.take(lease)
        with pytest.raises(ReadError, match="broken"):
            lease.wait()
        lease.release()
        reader.fail_at = {}
        experts.fetch(store, 0, range(6))
        for region in store._cells.regions:
            assert idle_cells(region) == region.count


def test_a_view_of_all_cells_is_made_once_for_all_modes(tmp_path: Path) -> None:
    experts = RandomExperts(tmp_path)
    view = experts.sets(1)[0].tensors[0]
    with experts.store() as store:
        region = store.lease(store.groups(0, [1])[0]).region
        with torch.inference_mode():
            made = region.strided(view)
        assert not made.is_inference()
        assert region.strided(view) is made
