"""A running pipeline that switches to another plan: residents that are added and removed, and batches under way."""

import asyncio
import dataclasses

import pytest
import torch
from support.checkpoints import CPU, GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.faults import Gate
from support.loop import happens, run
from support.sweeping import recording_reader

from layerstream.pipeline import BusyError, ClosedError, DeviceError, Pipeline, PlanError
from layerstream.stages.devices.cpu import CpuDevice
from layerstream.stages.process.usage import anonymous_bytes
from layerstream.stages.residents import Residents

BLOCKS = 6
BATCHES = BLOCKS + 2


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path, write_checkpoint(tmp_path, blocks=BLOCKS)


def with_residents(plan, *, on_host=(), on_device=()):
    """``plan`` with these residents, in the rings of a plan without any."""
    rings = arranged(plan)
    return dataclasses.replace(
        arranged(plan, on_host=on_host, on_device=on_device),
        host_arena_bytes=rings.host_arena_bytes,
        device_arena_bytes=rings.device_arena_bytes,
    )


CHANGES = {
    "some added": ((), (1, 4)),
    "some removed": ((1, 4), ()),
    "some added, others removed": ((1, 4), (2, 4, 6)),
    "all added": ((), range(BATCHES)),
    "all removed": (range(BATCHES), ()),
    "most removed": (range(BATCHES), (3,)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("side", ["on_host", "on_device"])
@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
def test_sweeps_stay_exact_and_read_what_is_not_resident(checkpoint, hardware, side, change):
    folder, expected = checkpoint
    plain = plan_for(folder, hardware)
    old, new = (with_residents(plain, **{side: residents}) for residents in change)
    device = FakeDevice() if hardware is GPU else None
    reader, seen = recording_reader(old), []

    def compute(batch, state):
        for name, tensor in batch.tensors.items():
            if device is None:
                seen.append((name, tensor.clone()))
            else:
                device.launch(lambda name=name, tensor=tensor: seen.append((name, tensor.clone())))
        return state + 1

    async def main():
        async with Pipeline(old, reader=reader, device=device) as pipeline:
            for _ in range(2):
                assert await pipeline.run(compute, 0) == BATCHES
            await pipeline.adopt(new)
            assert pipeline.plan is new
            for _ in range(2):  # which also loads the new residents
                assert await pipeline.run(compute, 0) == BATCHES
            before = len(reader.log)
            for _ in range(4):
                assert await pipeline.run(compute, 0) == BATCHES
            if device is not None:
                await pipeline.run(lambda _batch, _state: device.finish(), None)
            return reader.log[before:]

    read = run(main())
    streamed = {batch.index for batch in new.batches if batch.streamed}
    assert set(read) == streamed  # every layer lies in a file of its own
    assert len(seen) == 8 * len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in seen)
    assert device is None or device.host_memories == 0


def test_batches_read_ahead_are_not_read_again_when_residents_are_added(checkpoint):
    folder, _ = checkpoint
    plain = plan_for(folder, CPU)
    reader = recording_reader(plain)

    async def main():
        async with Pipeline(with_residents(plain), reader=reader) as pipeline:
            await pipeline.run(lambda _batch, _state: None, None)
            await wait_for_reads(reader, BATCHES + 1)
            await pipeline.adopt(with_residents(plain, on_host=(5,)))
            await pipeline.run(lambda _batch, _state: None, None)
            return reader.log

    log = run(main())
    # Two reads that begin at once are logged in any order.
    assert sorted(log[: 2 * BATCHES]) == sorted([*range(BATCHES), *range(BATCHES)])


async def wait_for_reads(reader, requests):
    await asyncio.to_thread(reader.steps.wait_for, requests)


def test_when_residents_are_removed_their_memory_is_freed_before_the_next_sweep(checkpoint):
    folder, _ = checkpoint
    plain = plan_for(folder, GPU)
    device = FakeDevice()

    async def main():
        everything = with_residents(plain, on_host=range(BATCHES))
        async with Pipeline(everything, device=device) as pipeline:
            await pipeline.run(lambda _batch, _state: None, None)
            assert device.host_memories == 1 + BATCHES
            await pipeline.adopt(with_residents(plain, on_host=(2,)))
            assert device.host_memories == 1 + 1

    run(main())


def test_without_memory_for_the_new_residents_the_old_plan_stays(checkpoint):
    folder, expected = checkpoint
    plain = plan_for(folder, GPU)
    old = with_residents(plain, on_device=(1,))
    device = FakeDevice(memory_bytes=old.device_arena_bytes + old.batches[1].device_bytes + 1)
    seen = []

    async def main():
        async with Pipeline(old, device=device) as pipeline:
            with pytest.raises(DeviceError):
                await pipeline.adopt(with_residents(plain, on_device=(1, 3, 5)))
            assert pipeline.plan is old
            await pipeline.run(lambda batch, _state: seen.extend(batch.tensors), None)

    run(main())
    assert set(seen) == set(expected)


def test_a_change_that_fails_half_way_raises_and_the_old_plan_restores_it(checkpoint):
    folder, expected = checkpoint
    plain = plan_for(folder, GPU)
    old = with_residents(plain, on_device=(1,), on_host=(2,))
    device = FakeDevice(memory_bytes=old.device_arena_bytes + old.batches[1].device_bytes + 1)
    seen = []

    async def main():
        async with Pipeline(old, device=device) as pipeline:
            with pytest.raises(DeviceError):
                await pipeline.adopt(with_residents(plain, on_device=(1, 3, 5)))
            assert pipeline.plan.batches[1].device_resident
            assert pipeline.plan.batches[2].streamed
            await pipeline.adopt(old)
            assert pipeline.plan is old
            assert device.host_memories == 1 + 1
            await pipeline.run(lambda batch, _state: seen.extend(batch.tensors), None)

    run(main())
    assert set(seen) == set(expected)


def test_a_change_whose_caller_is_cancelled_leaves_no_memory_without_a_plan(checkpoint):
    folder, _ = checkpoint
    plain = plan_for(folder, GPU)
    device = FakeDevice()
    allocate = device.host_memory

    async def main(gate):
        async with Pipeline(with_residents(plain), device=device) as pipeline:
            new = with_residents(plain, on_host=(1, 2))
            device.host_memory = lambda nbytes: (gate(), allocate(nbytes))[1]
            adopting = asyncio.create_task(pipeline.adopt(new))
            await happens(gate.reached)
            adopting.cancel()
            await asyncio.sleep(0)
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await adopting
            assert pipeline.plan is new
            await pipeline.adopt(with_residents(plain))
            assert device.host_memories == 1

    with Gate() as gate:
        run(main(gate))


def test_a_resident_on_one_side_may_become_resident_on_both(checkpoint):
    folder, expected = checkpoint
    plain = plan_for(folder, GPU)
    device, seen = FakeDevice(), []

    async def main():
        async with Pipeline(with_residents(plain, on_host=(1,)), device=device) as pipeline:
            await pipeline.run(lambda _batch, _state: None, None)
            await pipeline.adopt(with_residents(plain, on_host=(1,), on_device=(1,)))
            for _ in range(2):
                await pipeline.run(lambda batch, _state: seen.extend(batch.tensors), None)

    run(main())
    assert len(seen) == 2 * len(expected)


def test_a_late_report_of_a_copy_does_not_mark_other_memory_as_loaded(checkpoint):
    folder, _ = checkpoint
    plain = plan_for(folder, GPU)
    first, again = (with_residents(plain, on_device=(1,)).batches for _ in range(2))

    async def main():
        residents = Residents(first, FakeDevice())
        assert not await residents.loaded(first[1])
        residents.remove([1])
        residents.add(again)
        residents.arrived(first[1])
        assert not await residents.loaded(again[1])
        residents.arrived(again[1])
        assert await residents.loaded(again[1])
        residents.close()

    run(main())


def test_before_residents_are_added_the_heap_returns_free_memory(checkpoint):
    folder, _ = checkpoint
    batches = with_residents(plan_for(folder, CPU), on_host=(1,)).batches
    freed = [torch.ones(16_000) for _ in range(1000)]  # of 64 KB, which are not mapped one by one
    last = freed.pop()  # below which the heap does not shrink by itself
    freed.clear()
    before = anonymous_bytes()
    Residents(batches, CpuDevice()).close()
    assert anonymous_bytes() < before - (48 << 20)
    assert last.numel()


def test_a_new_resident_has_to_fit_the_ring_that_it_is_loaded_through(checkpoint):
    folder, _ = checkpoint
    plain = plan_for(folder, GPU)
    last = BATCHES - 1
    small = dataclasses.replace(
        with_residents(plain, on_device=(last,)),
        device_arena_bytes=3 * max(batch.device_bytes for batch in plain.batches[:-1]),
    )

    async def main():
        async with Pipeline(small, device=FakeDevice()) as pipeline:
            batches = with_residents(plain, on_host=(last,)).batches
            with pytest.raises(PlanError, match="larger than the running pipeline's slots"):
                await pipeline.adopt(dataclasses.replace(small, batches=batches))
            await pipeline.run(lambda _batch, _state: None, None)

    run(main())


def test_a_sweep_under_way_is_not_disturbed(checkpoint):
    folder, _ = checkpoint
    plain = plan_for(folder, CPU)

    async def main():
        async with Pipeline(with_residents(plain)) as pipeline:
            async with pipeline.sweep() as sweep:
                await sweep.receive()
                with pytest.raises(BusyError):
                    await pipeline.adopt(with_residents(plain, on_host=(1,)))
            await pipeline.adopt(with_residents(plain, on_host=(1,)))
        with pytest.raises(ClosedError):
            await pipeline.adopt(plain)

    run(main())


def test_a_plan_with_other_batches_or_too_large_ones_is_refused(checkpoint):
    folder, _ = checkpoint
    plain = plan_for(folder, CPU)
    larger = dataclasses.replace(plan_for(folder, CPU, slots=2), reader="mmap")
    rings = with_residents(plain)
    smaller_rings = dataclasses.replace(rings, host_arena_bytes=rings.host_arena_bytes - 4096)
    small = dataclasses.replace(
        with_residents(plain, on_host=(BATCHES - 1,)),
        host_arena_bytes=3 * max(batch.host_bytes for batch in plain.batches[:-1]),
    )

    async def main():
        async with Pipeline(with_residents(plain)) as pipeline:
            for other in (larger, smaller_rings):  # rings are allocated once
                with pytest.raises(PlanError, match="differ in more than their residents"):
                    await pipeline.adopt(other)
        async with Pipeline(small) as pipeline:
            with pytest.raises(PlanError, match="larger than the running pipeline's slots"):
                await pipeline.adopt(
                    dataclasses.replace(small, batches=with_residents(plain).batches)
                )
            await pipeline.run(lambda _batch, _state: None, None)

    run(main())


def test_closing_while_residents_are_removed_leaves_nothing_behind(checkpoint):
    folder, _ = checkpoint
    plain = plan_for(folder, GPU)
    device = FakeDevice()
    old = with_residents(plain, on_host=range(BATCHES))
    reader = recording_reader(old)

    async def main(gate):
        pipeline = Pipeline(old, reader=reader, device=device)
        async with pipeline:
            await pipeline.run(lambda _batch, _state: None, None)
            reader.steps.before(reader.steps.count, gate)
            adopting = asyncio.create_task(pipeline.adopt(with_residents(plain)))
            await happens(gate.reached)
            closing = asyncio.create_task(pipeline.aclose())
            await asyncio.sleep(0)
            gate.open()
            await closing
            with pytest.raises(ClosedError):
                await adopting

    with Gate() as gate:
        run(main(gate))
    assert device.host_memories == 0
