"""The expert store: the right bytes in the right cells, whoever takes, fails or gives up when."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.experts import FailingReader, RandomExperts, idle_cells
from support.faults import Gate
from support.leaks import nothing_left_behind

from layerstream.stages.batch import Extent
from layerstream.stages.errors import ClosedError, ReadError
from layerstream.stages.experts.lease import ExpertGroup, Lease
from layerstream.stages.experts.store import ExpertStore

SECONDS = 10


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def experts(tmp_path: Path) -> RandomExperts:
    return RandomExperts(tmp_path)


@pytest.fixture
def one_layer(tmp_path: Path) -> RandomExperts:
    return RandomExperts(tmp_path, layers=1)


def group(*experts: int, layer: int = 0, passing: bool = False) -> ExpertGroup:
    return ExpertGroup(set_index=layer, experts=experts, passing=passing)


def take(store: ExpertStore, *experts: int, layer: int = 0, passing: bool = False) -> Lease:
    lease = store.lease(group(*experts, layer=layer, passing=passing))
    assert store.take(lease, wait_for=None)
    return lease


def first_reads(experts: RandomExperts, expert: int) -> list[tuple[int, int]]:
    """The places of the reads of ``expert`` of the first layer, in order."""
    reads = experts.sets(1)[0].reads(
        expert, request_bytes=4096, file_bytes=tuple(p.stat().st_size for p in experts.paths)
    )
    return [(read.extent.file, read.extent.offset) for read in reads]


def assert_all_home(store: ExpertStore) -> None:
    for region in store._cells.regions:
        assert idle_cells(region) == region.count


def until_home(store: ExpertStore) -> None:
    """Wait for the reads that nobody waits for."""
    deadline = time.monotonic() + SECONDS
    regions = store._cells.regions
    while any(idle_cells(each) < each.count for each in regions) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert_all_home(store)


# -- which cells ---------------------------------------------------------------------------------


def test_the_least_recently_used_expert_makes_way(experts: RandomExperts) -> None:
    with experts.store(cells=3, shared=0) as store:
        experts.fetch(store, 1, [0, 1, 2])
        for expert in (0, 1, 2, 0):
            experts.fetch(store, 0, [expert])
        experts.fetch(store, 1, [0, 1, 2])  # used since, so the other layer's 1 makes way for 3
        experts.fetch(store, 0, [3])
        before = store.counts()
        assert (before.wanted, before.hits) == (11, 4)
        experts.fetch(store, 0, [0, 2, 3])
        experts.fetch(store, 1, [0, 1, 2])
        assert store.counts().hits == before.hits + 6
        assert store.counts().read_bytes == before.read_bytes
        experts.fetch(store, 0, [1])
        assert store.counts().hits == before.hits + 6
        assert_all_home(store)


def test_a_held_cell_never_makes_way(experts: RandomExperts) -> None:
    with experts.store(cells=3, shared=0) as store:
        held = take(store, 0, 1)
        held.wait()
        assert not store.take(store.lease(group(2, 3, 4, 5, 0, layer=1)), wait_for=None)
        for expert in (2, 3, 4, 5):
            experts.fetch(store, 0, [expert])
            experts.fetch(store, 1, [expert])
            experts.check(held)
        # Of a demand, what is there is held before anything makes way: 0 and 1 are the least recently used.
        held.release()
        hits = store.counts().hits
        experts.fetch(store, 0, [0, 1, 2])
        assert store.counts().hits >= hits + 2
        held.release()  # again
        assert_all_home(store)


def test_what_is_passing_makes_way_first(experts: RandomExperts) -> None:
    with experts.store(
        cells=2, shared=2
    ) as store:  # 6 cells, of which the first layer's quota is 3
        experts.fetch(store, 1, [0, 1, 2])
        experts.fetch(store, 0, range(6))  # a long prompt
        hits = store.counts().hits
        experts.fetch(
            store, 1, [1, 2]
        )  # only the first of three that passed took another one's cell
        assert store.counts().hits == hits + 2
        assert_all_home(store)


def test_with_fewer_cells_than_a_token_needs_each_layer_keeps_what_it_has(
    experts: RandomExperts,
) -> None:
    with experts.store(cells=1, shared=2) as store:
        for _ in range(5):
            for layer in (0, 1):
                experts.fetch(store, layer, [0, 1, 2])
        assert store.counts().hits == 2 * 4


def test_an_expert_that_two_passes_want_is_read_once(experts: RandomExperts) -> None:
    with Gate() as gate:
        reader = FailingReader(experts.paths)
        reader.before = lambda _: gate()
        with experts.store(reader=reader) as store:
            leases = [take(store, 0, 1), take(store, 1, 0)]
            assert not any(lease.ready for lease in leases)
            gate.open()
            for lease in leases:
                lease.wait()
                experts.check(lease)
                lease.release()
            counts = store.counts()
            assert (counts.wanted, counts.hits) == (4, 2)
            assert counts.wait_seconds > 0
            experts.fetch(store, 0, [0, 1])
            assert store.counts().read_bytes == counts.read_bytes


def test_bytes_are_those_that_were_read_from_the_files(experts: RandomExperts) -> None:
    with experts.store(cells=2) as store:
        experts.fetch(store, 0, [3, 5])
        sizes = tuple(path.stat().st_size for path in experts.paths)
        extents = [
            read.extent
            for expert in (3, 5)
            for read in experts.sets(2)[0].reads(expert, request_bytes=4096, file_bytes=sizes)
        ]
        assert store.counts().read_bytes == sum(extent.nbytes for extent in extents)
        assert all(extent.nbytes <= 4096 and not extent.offset % 4096 for extent in extents)


@pytest.mark.parametrize("shared", [0, 1, 2, 5])
def test_a_demand_above_the_cells_comes_in_groups(experts: RandomExperts, shared: int) -> None:
    with experts.store(cells=2, shared=shared) as store:
        experts.fetch(store, 0, [4, 5])
        hits = store.counts().hits
        groups = store.groups(0, range(6))
        assert sorted(e for each in groups for e in each.experts) == list(range(6))
        for each in groups:
            assert list(each.experts) == sorted(each.experts)
            assert len(each.experts) <= (max(shared // 2, 1) if each.passing else 2)
        experts.fetch(store, 0, range(6))
        if shared:  # what is kept is used, and stays
            assert groups[0].experts == (4, 5)
            experts.fetch(store, 0, [4, 5])
            assert store.counts().hits == hits + 4
        assert_all_home(store)


@settings(max_examples=25)
@given(st.data())
def test_any_sequence_of_demands_gets_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sizes = data.draw(st.tuples(st.sampled_from([1, 64, 4095, 9000]), st.sampled_from([1, 4096])))
    experts = RandomExperts(tmp_path_factory.mktemp("files"), sizes=sizes)
    cells, shared = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 4))
    demand = st.tuples(st.integers(0, 1), st.sets(st.integers(0, 5), min_size=1).map(sorted))
    with experts.store(
        cells=cells, shared=shared, most=data.draw(st.sampled_from([4096, 1 << 20]))
    ) as store:
        for layer, wanted in data.draw(st.lists(demand, max_size=8)):
            experts.fetch(store, layer, wanted)
        assert_all_home(store)


# -- errors, and passes that give up ---------------------------------------------------------------


def test_a_failed_read_reaches_everybody_who_waits_and_the_cell_is_used_again(
    experts: RandomExperts,
) -> None:
    reader = FailingReader(experts.paths)
    error = ReadError("broken")
    error.__cause__ = OSError("the disk")
    reader.fail_at[first_reads(experts, 0)[0]] = error  # no other expert's reads cover it
    with Gate() as gate, experts.store(cells=2, reader=reader) as store:
        reader.before = lambda _: gate()
        leases = [take(store, 0), take(store, 0), take(store, 1)]
        gate.open()
        for lease in leases[:2]:
            with pytest.raises(ReadError, match="broken") as caught:
                lease.wait()
            assert caught.value is not error
            assert caught.value.__cause__ is error.__cause__
            caught.value.add_note("a pass's own")
            assert caught.value.__notes__[:-1] == error.__notes__
            assert "expert 0 of layers.0.experts" in error.__notes__[0]
        leases[2].wait()
        for lease in leases:
            lease.release()
        reader.fail_at.clear()
        experts.fetch(store, 0, [0, 3])
        experts.fetch(store, 0, range(6))
        assert_all_home(store)


def test_a_cell_is_not_used_again_while_a_read_still_writes_into_it(
    one_layer: RandomExperts,
) -> None:
    reader = FailingReader(one_layer.paths)
    slow = first_reads(one_layer, 0)[-1]
    with Gate() as gate, one_layer.store(cells=1, shared=0, reader=reader) as store:
        reader.before = lambda at: gate() if (at.file, at.offset) == slow else None
        take(store, 0).release()  # its pass was cancelled
        assert gate.reached.wait(SECONDS)
        assert not store.take(store.lease(group(1)), wait_for=None)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(one_layer.fetch, store, 0, [1])
            gate.open()
            waiting.result(SECONDS)
        assert_all_home(store)


@pytest.mark.parametrize("early", [True, False], ids=["given up before", "given up after"])
def test_a_read_that_fails_when_nobody_waits_any_more_gives_its_cell_back(
    one_layer: RandomExperts, *, early: bool
) -> None:
    reader = FailingReader(one_layer.paths)
    reader.fail_at[first_reads(one_layer, 0)[0]] = ReadError("broken")
    with Gate() as gate, one_layer.store(cells=1, shared=0, reader=reader) as store:
        reader.before = lambda _: gate()
        lease = take(store, 0)
        if early:
            lease.release()
        gate.open()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(one_layer.fetch, store, 0, [1])  # which waits for the cell
            if not early:
                with pytest.raises(ReadError):
                    lease.wait()
                lease.release()
            waiting.result(SECONDS)
        assert_all_home(store)


def test_closing_fails_whoever_waits(one_layer: RandomExperts) -> None:
    reader = FailingReader(one_layer.paths)
    with Gate() as gate, one_layer.store(cells=1, shared=0, reader=reader, threads=1) as store:
        reader.before = lambda _: gate()
        lease = take(store, 0)
        with ThreadPoolExecutor(3) as pool:
            for_cells = pool.submit(store.take, store.lease(group(1)))
            for_bytes = pool.submit(lease.wait)
            assert gate.reached.wait(SECONDS)
            closing = pool.submit(store.close)
            with pytest.raises(ClosedError):
                for_cells.result(SECONDS)
            gate.open()
            with pytest.raises(ClosedError):
                for_bytes.result(SECONDS)
            closing.result(SECONDS)
        lease.release()
        for call in (lambda: store.lease(group(0)), lambda: store.groups(0, [0])):
            with pytest.raises(ClosedError):
                call()
        assert store.counts().wanted == 1


def test_many_threads_that_take_fail_and_give_up(experts: RandomExperts) -> None:
    """Each holds what it has while it checks it; a few reads fail, a few passes go without waiting."""
    reader = FailingReader(experts.paths)
    reader.fail_at[first_reads(experts, 0)[0]] = ReadError("broken")
    failures = threading.Semaphore(0)

    def work(store: ExpertStore, seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            layer, wanted = draw.randrange(2), sorted(draw.sample(range(6), draw.randint(1, 5)))
            for each in store.groups(layer, wanted):
                lease = store.lease(each)
                try:
                    assert store.take(lease)
                    if draw.random() < 0.2:
                        break
                    lease.wait()
                    experts.check(lease)
                except ReadError:
                    assert layer == 0
                    assert 0 in each.experts
                    failures.release()
                finally:
                    lease.release()

    with experts.store(cells=3, shared=4, reader=reader, threads=3) as store:
        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(work, store, seed) for seed in range(6)]:
                future.result(3 * SECONDS)
        assert failures.acquire(blocking=False)
        until_home(store)  # who joins a read under way fails with it
        reader.fail_at.clear()
        for layer in (0, 1):
            experts.fetch(store, layer, range(6))
        assert_all_home(store)


def test_a_wrong_cell_would_be_seen(
    experts: RandomExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These tests would notice a store that confuses cells."""
    monkeypatch.setattr(Lease, "cells", property(lambda self: [c.number ^ 1 for c in self._cells]))
    with experts.store(cells=4) as store, pytest.raises(AssertionError):
        experts.fetch(store, 0, [0, 1, 2, 3])


def test_reads_of_neighbours_are_one(experts: RandomExperts) -> None:
    """Runs close to each other in a file are read together, with what is between them."""
    each = experts.sets(1)[1]  # its second half lies all in one file
    reads = list(each.reads(0, request_bytes=1 << 20, file_bytes=(1 << 30, 1 << 30)))
    assert len(reads) == 1
    assert isinstance(reads[0].extent, Extent)
    assert sum(copied.nbytes for copied in reads[0].copies) == each.expert_bytes
