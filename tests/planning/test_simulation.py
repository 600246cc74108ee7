"""The predicted time of a sweep: the simulation against the formula, the real ring, and the trivial plans."""

import asyncio
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import CPU, GPU
from support.plans import plan_of

from layerstream.pipeline import PlanError, Workload
from layerstream.pipeline.machine.hardware import ComputeRate
from layerstream.pipeline.planning.simulation import BatchCost, _Ring, simulate
from layerstream.stages.arena import RingArena

MIB = 1 << 20
seconds = st.floats(0, 10, allow_nan=False)
sweeps = st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=12)


def cost(read: float, copy: float, compute: float, nbytes: int = 1) -> BatchCost:
    return BatchCost(
        read_seconds=read,
        copy_seconds=copy,
        compute_seconds=compute,
        host_bytes=nbytes,
        device_bytes=nbytes,
    )


def simulated(batches, *, slots=1 << 30, overhead=0.0, times=6):
    return simulate(
        [batches] * times,
        host_ring_bytes=slots,
        device_ring_bytes=slots,
        overhead_seconds=overhead,
        between_seconds=0.0,
    )


@given(sweeps, st.integers(1, 4))
def test_no_sweep_is_faster_than_its_busiest_stage_or_slower_than_one_stage_after_another(
    batches, slots
):
    costs = simulated([cost(*each) for each in batches], slots=slots, times=8)
    busy = [sum(stage) for stage in zip(*batches, strict=True)]
    total = sum(each.seconds for each in costs)
    # Prefetch runs ahead, so one sweep may borrow from the one before it; all of them together do not.
    assert total >= 8 * max(busy) - 1e-6
    assert all(each.seconds <= sum(busy) + 1e-6 for each in costs[:1])
    assert total <= 8 * sum(busy) + 1e-6


@pytest.mark.parametrize(
    ("batch", "seconds"),
    [((5, 1, 1), 50), ((1, 5, 1), 50), ((1, 1, 5), 50)],
    ids=["read", "transfer", "compute"],
)
def test_where_one_stage_dominates_a_sweep_takes_what_the_formula_says(batch, seconds):
    steady = simulated([cost(*batch)] * 10, slots=3)[3]
    assert steady.seconds == pytest.approx(seconds)
    assert max(steady.read_seconds, steady.transfer_seconds, steady.compute_seconds) == seconds
    assert steady.ceiling == pytest.approx(7 / 5)


def test_hand_offs_are_added_where_computing_is_the_bottleneck():
    steady = simulated([cost(1, 1, 5)] * 10, slots=3, overhead=0.25)[3]
    assert steady.seconds == pytest.approx(10 * 5.25)
    assert steady.overhead_seconds == pytest.approx(2.5)


@given(sweeps)
def test_with_one_slot_a_sweep_is_the_sum_of_its_stages(batches):
    # The next batch is read into the host slot when this one was computed with, as on a CPU.
    costs = simulated([cost(*each) for each in batches], slots=1)
    for each in costs:
        assert each.seconds == pytest.approx(sum(map(sum, batches)), abs=1e-9)


def test_a_host_slot_that_comes_free_with_the_copy_lets_the_next_read_begin():
    batch = BatchCost(
        read_seconds=2, copy_seconds=1, compute_seconds=3, host_bytes=1, copied_away=True
    )
    costs = simulate(
        [[batch] * 4] * 4,
        host_ring_bytes=1,
        device_ring_bytes=0,
        overhead_seconds=0,
        between_seconds=0,
    )
    assert costs[2].seconds == pytest.approx(4 * 3)  # computing hides read and copy


def test_the_time_between_two_steps_counts_only_where_computation_is_the_bottleneck():
    def steady(batch):
        return simulate(
            [[batch] * 3] * 5,
            host_ring_bytes=3,
            device_ring_bytes=3,
            overhead_seconds=0,
            between_seconds=1,
        )[3].seconds

    assert steady(cost(0, 0, 2)) == pytest.approx(3 * 2 + 1)
    assert steady(cost(5, 0, 0)) == pytest.approx(3 * 5)


steps = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 20)),  # bytes, and how long the slot is held
    min_size=1,
    max_size=40,
)


@given(st.integers(60, 150), steps)
def test_the_predicted_ring_gives_each_slot_when_and_where_the_real_one_does(capacity, steps):
    asyncio.run(_compare(capacity, steps))


async def _compare(capacity, steps):
    """Drive both rings: the real one by a clock that jumps to the time when the next slots are returned."""
    predicted, real = _Ring(capacity), RingArena(torch.empty(capacity, dtype=torch.uint8))
    now, held = 0.0, []

    def give_back():
        for due, slot in [each for each in held if each[0] <= now]:
            real.give_back(slot)
            held.remove((due, slot))

    for nbytes, held_seconds in steps:
        at = predicted.take(nbytes)
        if not nbytes:  # takes none
            assert at == 0
            continue
        give_back()
        taking = asyncio.ensure_future(real.take(nbytes))
        await asyncio.sleep(0)
        while not taking.done():
            now = max(now, min(due for due, _ in held))
            give_back()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        slot = taking.result()
        assert (at, predicted._taken) == (now, slot.offset)
        predicted.free(now + held_seconds)
        held.append((now + held_seconds, slot))


@st.composite
def plan_arguments(draw):
    machine = draw(st.sampled_from([CPU, GPU]))
    hardware = dataclasses.replace(
        machine,
        disk_bytes_per_second=draw(st.floats(1e7, 1e10)),
        compute=(ComputeRate(tokens=1, bytes_per_second=draw(st.floats(1e8, 1e11))),),
    )
    return {
        "sizes": [2 * n for n in draw(st.lists(st.integers(1, 2 * MIB), min_size=3, max_size=16))],
        "hardware": hardware,
        "host": draw(st.integers(20 * MIB, 60 * MIB)),
        "vram": None if machine is CPU else draw(st.integers(70 * MIB, 100 * MIB)),
        "objective": draw(st.sampled_from(["latency", "throughput"])),
        "workload": draw(st.none() | st.just(Workload(prompt_tokens=64, new_tokens=8))),
    }


@given(plan_arguments())
def test_a_plan_is_never_slower_by_its_own_model_than_the_trivial_plans(arguments):
    try:
        plan = plan_of(**arguments)
    except PlanError:
        return
    (chosen,) = [each for each in plan.candidates if each.chosen]
    assert any(each.name for each in plan.candidates)
    # If the time of computation is not known, more slots come before the small gain of a further resident.
    equal = 1.01 if arguments["workload"] else 1.1
    # One slot with residents is for where nothing else fits, whatever time the model predicts.
    rivals = [each for each in plan.candidates if each.name or each.slots > 1]
    assert all(chosen.request_seconds <= equal * each.request_seconds for each in rivals)
    alone = plan_of(**arguments, layer_batch_size=1, slots=1)
    trivial = next(each for each in alone.candidates if each.name)
    assert plan.prediction.request_seconds <= equal * trivial.request_seconds
