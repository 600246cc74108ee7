"""Experts that are copied from a store in host memory to one on a device."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.experts import FailingReader, RandomExperts, idle_cells
from support.fake_device import FakeDevice
from support.leaks import nothing_left_behind

from layerstream.stages.errors import ClosedError, ReadError
from layerstream.stages.experts.expert_copies import ExpertCopies
from layerstream.stages.experts.lease import ExpertGroup, Lease
from layerstream.stages.experts.store import ExpertStore

SECONDS = 20


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with nothing_left_behind():
        yield


@contextmanager
def on_device(
    experts: RandomExperts,
    device: FakeDevice,
    *,
    cells: int = 0,
    host_cells: int = 0,
    reader: FailingReader | None = None,
) -> Iterator[tuple[ExpertStore, ExpertStore]]:
    """A store on ``device`` with ``cells`` for each layer and two for all, and the one in host memory below it."""
    with experts.store(cells=host_cells, shared=2, reader=reader) as host:
        store = ExpertStore(
            experts.sets(cells),
            passing_cells=2,
            allocate=device.device_memory,
            loader=ExpertCopies(host, device, threads=2),
            device=device,
        )
        try:
            yield store, host
        finally:
            store.close()


def taken(store: ExpertStore, *numbers: int) -> Lease:
    """A lease for experts of the first layer, when they are there."""
    lease = store.lease(ExpertGroup(set_index=0, experts=numbers, passing=False))
    assert store.take(lease)
    lease.wait()
    return lease


def test_they_pass_through_fewer_cells_than_there_are_experts(tmp_path: Path) -> None:
    experts, device = RandomExperts(tmp_path), FakeDevice()
    with on_device(experts, device) as (store, host):
        for layer in (0, 1, 0):
            experts.fetch(store, layer, range(6))
        for region in [*store._cells.regions, *host._cells.regions]:
            assert idle_cells(region) == region.count
        counts = store.counts()
        assert (counts.wanted, counts.read_bytes) == (18, host.counts().read_bytes)


def test_an_expert_that_is_in_host_memory_is_not_read_again(tmp_path: Path) -> None:
    experts, device = RandomExperts(tmp_path), FakeDevice()
    with on_device(experts, device) as (store, host):
        taken(store, 0, 1).release()
        before = host.counts().read_bytes
        store._cells.of_set[0]._make_room(2)  # as if others had needed the cells of the device
        taken(store, 0, 1).release()
        assert host.counts().read_bytes == before


def test_a_long_prompt_displaces_nothing_in_host_memory_either(tmp_path: Path) -> None:
    experts, device = RandomExperts(tmp_path), FakeDevice()
    with on_device(experts, device, host_cells=3) as (store, host):
        read = [0]
        for _ in range(4):
            for layer in range(2):
                experts.fetch(store, layer, range(6))
            read.append(host.counts().read_bytes)
        each = [after - before for before, after in itertools.pairwise(read)]
        assert max(each[1:]) <= 0.6 * each[0]  # a half stays of each layer


@pytest.mark.parametrize("failing", ["record", "copy"])
def test_a_device_that_fails_once_loses_no_cells_and_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    experts, device = RandomExperts(tmp_path), FakeDevice()

    def fail(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("once")

    with on_device(experts, device) as (store, _):
        lease = taken(store, 0, 1)
        memory, seen = lease.tensors, list[torch.Tensor]()
        expected = [each.clone() for each in memory]
        device.launch(lambda: seen.extend(each.clone() for each in memory))
        if failing == "record":
            monkeypatch.setattr(device, failing, fail)
            with pytest.raises(RuntimeError, match="once"):
                lease.release()
        else:
            lease.release()
            monkeypatch.setattr(device, failing, fail)
            lease = store.lease(ExpertGroup(set_index=0, experts=(2, 3), passing=False))
            assert store.take(lease)
            with pytest.raises(RuntimeError, match="once"):
                lease.wait()
            lease.release()
        taken(store, 2, 3).release()
        taken(store, 4, 5).release()
        device.finish()
        assert all(map(torch.equal, seen, expected))
        for region in store._cells.regions:
            assert idle_cells(region) == region.count


def test_work_that_is_still_queued_reads_what_was_there_when_it_was_queued(tmp_path: Path) -> None:
    experts, device = RandomExperts(tmp_path), FakeDevice()
    with on_device(experts, device) as (store, _):
        lease = taken(store, 0, 1)
        memory = lease.tensors
        expected = [each.clone() for each in memory]
        seen: list[torch.Tensor] = []
        device.launch(lambda: seen.extend(each.clone() for each in memory))
        lease.release()
        taken(store, 2, 3).release()  # in the same cells
        device.finish()
        assert all(map(torch.equal, seen, expected))
        assert not any(map(torch.equal, memory, expected))


def test_a_read_that_fails_fails_who_waits_for_the_device(tmp_path: Path) -> None:
    experts, device = RandomExperts(tmp_path), FakeDevice()
    reader = FailingReader(experts.paths)
    with on_device(experts, device, reader=reader) as (store, host):
        reader.before = _broken
        lease = store.lease(ExpertGroup(set_index=0, experts=(0,), passing=False))
        assert store.take(lease)
        with pytest.raises(ReadError, match="broken"):
            lease.wait()
        lease.release()
        reader.before = lambda _: None
        lease = taken(store, 0)
        experts.check(lease)
        lease.release()
        for region in [*store._cells.regions, *host._cells.regions]:
            assert idle_cells(region) == region.count


def _broken(_: object) -> None:
    raise ReadError("broken")


def test_closing_fails_who_waits(tmp_path: Path) -> None:
    experts, device = RandomExperts(tmp_path), FakeDevice()
    reader, reading, go_on = FailingReader(experts.paths), threading.Event(), threading.Event()

    def held(_: object) -> None:
        reading.set()
        assert go_on.wait(SECONDS)

    reader.before = held
    errors: list[BaseException] = []
    with on_device(experts, device, reader=reader) as (store, _):
        lease = store.lease(ExpertGroup(set_index=0, experts=(0, 1), passing=False))
        other = store.lease(ExpertGroup(set_index=0, experts=(2, 3), passing=False))
        assert store.take(lease)
        assert reading.wait(SECONDS)

        def wait() -> None:
            try:
                store.take(other)  # for cells
            except ClosedError as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        closing = threading.Thread(target=store.close)
        closing.start()
        waiting.join(SECONDS)
        go_on.set()
        closing.join(SECONDS)
        assert not closing.is_alive()
        assert errors
        lease.release()
