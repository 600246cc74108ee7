"""The ring arena: slots in order, for batches of any size, never the same bytes twice."""

import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.leaks import used_slots
from support.loop import run

from layerstream.stages.arena import RingArena, Slot, ring_bytes
from layerstream.stages.errors import PlanError

CAPACITY = 64
sizes = st.integers(0, CAPACITY)


class Work:
    """An event, known by its identity."""

    def synchronize(self) -> None:
        raise AssertionError("the arena hands events on, it does not wait for them")


def arena(nbytes: int = CAPACITY) -> RingArena:
    return RingArena(torch.zeros(nbytes, dtype=torch.uint8))


async def take_now(ring: RingArena, nbytes: int) -> Slot | None:
    """A slot if it fits at once; a wait is cancelled."""
    taking = asyncio.create_task(ring.take(nbytes))
    await asyncio.sleep(0)
    if taking.done():
        return taking.result()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    return None


def overlap(a: Slot, b: Slot) -> bool:
    return max(a.offset, b.offset) < min(a.offset + a.nbytes, b.offset + b.nbytes)


@given(st.lists(st.tuples(sizes, st.integers(0, 7)), max_size=40))
def test_live_slots_never_overlap_and_the_ring_never_loses_space(steps):
    async def main():
        ring, live = arena(), []
        for nbytes, which in steps:
            slot = await take_now(ring, nbytes)
            if slot is not None:
                assert slot.tensor.numel() == slot.nbytes == nbytes
                assert 0 <= slot.offset <= slot.offset + nbytes <= CAPACITY
                assert not any(overlap(slot, other) for other in live)
                live.append(slot)
            elif not live:
                pytest.fail(f"an empty ring of {CAPACITY} bytes cannot hold {nbytes}")
            if live and which < len(live):
                ring.give_back(live.pop(which))
            assert used_slots(ring) == len(live)
        for slot in live:
            ring.give_back(slot)
        whole = await take_now(ring, CAPACITY)
        assert whole is not None
        assert whole.offset == 0

    run(main())


@given(st.lists(st.tuples(st.integers(1, CAPACITY), st.integers(0, 7)), max_size=60))
def test_a_slot_gets_the_events_of_everything_that_lay_in_its_place(steps):
    async def main():
        ring, live = arena(), []
        due: list[set[Work]] = [
            set() for _ in range(CAPACITY)
        ]  # by byte: work that may still use it
        for nbytes, which in steps:
            slot = await take_now(ring, nbytes)
            if slot is not None:
                under = range(slot.offset, slot.offset + slot.nbytes)
                assert set(slot.after) == set().union(*(due[byte] for byte in under))
                for byte in under:
                    due[byte] = set()
                live.append(slot)
            if live and which < len(live):
                given_back = live.pop(which)
                work = Work()
                ring.give_back(given_back, [work])
                for byte in range(given_back.offset, given_back.offset + given_back.nbytes):
                    due[byte].add(work)

    run(main())


@given(st.lists(sizes, min_size=1, max_size=8), st.integers(1, 4))
def test_first_in_first_out_every_batch_of_a_plan_gets_its_slot(batches, slots):
    async def main():
        ring, live = arena(ring_bytes(batches, slots=slots)), []
        for nbytes in batches * 5:
            while (slot := await take_now(ring, nbytes)) is None:
                ring.give_back(live.pop(0))  # IndexError: the ring is empty and still too small
            live.append(slot)

    run(main())


def test_a_slot_spans_several_that_were_given_back_and_gets_the_events_of_each():
    async def main():
        ring = arena(30)
        slots = [await ring.take(10) for _ in range(3)]
        work = [Work() for _ in range(3)]
        for slot, event in zip(slots, work, strict=True):
            ring.give_back(slot, [event])
        first, second = await ring.take(15), await ring.take(15)
        assert first.after == (work[0], work[1])
        assert second.after == (work[1], work[2])  # the middle one lay under both
        ring.give_back(first)
        ring.give_back(second)
        assert (await ring.take(30)).after == ()  # overwritten since: dropped

    run(main())


def test_events_of_many_rounds_do_not_pile_up():
    async def main():
        ring = arena(30)
        for nbytes in [7, 0, 11, 30, 3, 0, 29] * 50:
            ring.give_back(await ring.take(nbytes), [Work(), Work()])
        assert len(ring._events) < 20

    run(main())


def test_a_wait_for_space_ends_when_a_slot_is_given_back():
    async def main():
        ring = arena(10)
        first = await ring.take(10)
        waiting = asyncio.create_task(ring.take(4))
        await asyncio.sleep(0)
        assert not waiting.done()
        ring.give_back(first)
        assert (await waiting).nbytes == 4

    run(main())


def test_a_cancelled_wait_takes_nothing():
    async def main():
        ring = arena(10)
        first = await ring.take(10)
        assert await take_now(ring, 4) is None
        ring.give_back(first)
        assert used_slots(ring) == 0
        assert (await take_now(ring, 10)).nbytes == 10

    run(main())


def test_a_wait_that_is_cancelled_as_space_becomes_free_takes_nothing():
    async def main():
        ring = arena(10)
        first = await ring.take(10)
        waiting = asyncio.create_task(ring.take(10))
        await asyncio.sleep(0)
        ring.give_back(first)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert used_slots(ring) == 0

    run(main())


def test_a_slot_larger_than_the_ring_is_refused_instead_of_waited_for():
    async def main():
        with pytest.raises(PlanError, match="11 bytes does not fit an arena of 10 bytes"):
            await arena(10).take(11)

    run(main())


def test_giving_a_slot_back_twice_is_refused():
    async def main():
        ring = arena()
        slot = await ring.take(8)
        ring.give_back(slot)
        with pytest.raises(AssertionError, match="given back twice"):
            ring.give_back(slot)

    run(main())


def test_a_slot_that_was_given_back_has_no_bytes_any_more():
    async def main():
        ring = arena()
        slot = await ring.take(8)
        ring.give_back(slot)
        assert slot.tensor.numel() == 0

    run(main())


@pytest.mark.parametrize(
    ("batches", "slots", "expected"),
    [
        pytest.param([], 3, 0, id="no batches"),
        pytest.param([5], 3, 5, id="one batch has one slot"),
        pytest.param([5, 7], 3, 12, id="fewer batches than slots"),
        pytest.param([5, 5, 5, 5], 3, 15, id="equal batches"),
        pytest.param([1, 1, 1, 1, 100], 3, 102, id="a large head counts once"),
        pytest.param([100, 1, 1, 1, 100], 2, 200, id="head and embedding meet where sweeps join"),
        pytest.param([3, 9, 4], 1, 9, id="one slot holds the largest"),
    ],
)
def test_the_ring_is_as_large_as_the_largest_run_of_batches(batches, slots, expected):
    assert ring_bytes(batches, slots=slots) == expected
