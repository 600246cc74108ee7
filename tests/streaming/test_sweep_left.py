"""Sweeps that are left early: the next one is whole, and batches that were given back cannot be used."""

import asyncio
import gc
import random
import threading

import pytest
import torch
from support.checkpoints import CPU, GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.faults import Gate
from support.loop import run, turns
from support.sweeping import wrong_tensors

from layerstream.pipeline import ClosedError, Pipeline

BLOCKS = 6
BATCHES = BLOCKS + 2  # the embedding before the blocks, the head behind them


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a small checkpoint, and its tensors by name."""
    return tmp_path, write_checkpoint(tmp_path, blocks=BLOCKS)


async def leave_by_break(pipeline):
    async for batch in pipeline.sweep():
        if batch.index == 3:
            break


async def leave_by_aclose(pipeline):
    sweep = pipeline.sweep()
    await anext(sweep)
    await sweep.aclose()
    await sweep.aclose()


async def leave_by_context(pipeline):
    async with pipeline.sweep() as sweep:
        await anext(sweep)


async def leave_by_exception(pipeline):
    async def divide():
        async for batch in pipeline.sweep():
            _ = 1 // (batch.index - 2)

    with pytest.raises(ZeroDivisionError):
        await divide()


async def leave_by_cancellation(pipeline):
    received = asyncio.Event()

    async def consume():
        async for batch in pipeline.sweep():
            if batch.index == 2:
                received.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(consume())
    await received.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_never_iterating(pipeline):
    pipeline.sweep()


async def leave_by_dropping_it_in_another_thread(pipeline):
    sweeps = [pipeline.sweep()]
    await anext(sweeps[0])
    await asyncio.to_thread(sweeps.clear)
    await turns()


async def leave_by_a_cycle_that_only_the_collector_finds(pipeline):
    sweep = pipeline.sweep()
    await anext(sweep)
    sweep.cycle = sweep
    del sweep
    gc.collect()


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_aclose,
        leave_by_context,
        leave_by_exception,
        leave_by_cancellation,
        leave_by_never_iterating,
        leave_by_dropping_it_in_another_thread,
        leave_by_a_cycle_that_only_the_collector_finds,
    ],
)
@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
def test_after_a_sweep_that_was_left_early_the_next_one_is_whole(checkpoint, leave, hardware):
    folder, expected = checkpoint
    plan = arranged(plan_for(folder, hardware), slots=2)
    device = None if hardware is CPU else FakeDevice()

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            for _ in range(3):
                await leave(pipeline)
                seen = []
                async for batch in pipeline.sweep():
                    views = batch.tensors
                    if device:
                        device.finish()
                    assert all(torch.equal(t, expected[n]) for n, t in views.items())
                    seen.append(batch.index)
                assert seen == list(range(BATCHES))

    run(main())


class SlowFinalizer:
    """Keeps the garbage collector from the finalizers of later objects until ``gate`` is opened."""

    def __init__(self, gate):
        self.gate = gate

    def __del__(self):
        self.gate()


async def drop_in_a_cycle(pipeline, at, gate):
    """Fail at batch ``at`` of a sweep, and leave the traceback, and with it the sweep, to the garbage collector."""
    first = SlowFinalizer(gate) if gate else None
    sweep = pipeline.sweep()
    try:
        async for batch in sweep:
            _ = 1 // (at - batch.index)
    except ZeroDivisionError as error:
        sweep.cycle = error, first  # the traceback refers to this frame, and so to the sweep


@pytest.mark.parametrize("finalizers", ["have run", "have yet to run"])
@pytest.mark.parametrize("seed", range(10))
def test_a_sweep_that_the_garbage_collector_ends_in_another_thread_leaves_the_next_one_whole(
    checkpoint, seed, finalizers
):
    folder, expected = checkpoint
    chance = random.Random(seed)

    async def main():
        plan = arranged(plan_for(folder, CPU), slots=2)
        async with Pipeline(plan) as pipeline:
            for _ in range(5):
                with Gate() as gate:
                    held = gate if finalizers == "have yet to run" else None
                    await drop_in_a_cycle(pipeline, chance.randrange(BATCHES), held)
                    collecting = threading.Thread(target=gc.collect)
                    collecting.start()
                    if held:
                        gate.reached.wait()
                    else:
                        collecting.join()
                    sweep = pipeline.sweep()  # before the event loop's next turn
                    gate.open()
                    collecting.join()
                seen = []
                async for batch in sweep:
                    assert wrong_tensors(batch, expected) == []
                    seen.append(batch.index)
                assert seen == list(range(BATCHES))

    gc.collect()
    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


def test_an_ended_sweep_gives_no_more_batches(checkpoint):
    folder, _ = checkpoint

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            sweep = pipeline.sweep()
            await sweep.aclose()
            with pytest.raises(ClosedError, match="has ended; ask the pipeline for a new one"):
                await anext(sweep)

    run(main())


def test_a_batch_that_was_given_back_gives_no_tensors(checkpoint):
    folder, _ = checkpoint

    async def main():
        async with Pipeline(plan_for(folder, CPU)) as pipeline:
            batches = [batch async for batch in pipeline.sweep()]
            with pytest.raises(ClosedError, match="layer batch 3 was given back"):
                _ = batches[3].tensors

    run(main())


def test_a_tensor_that_is_still_referenced_can_be_read_after_the_pipeline_was_closed(checkpoint):
    folder, _ = checkpoint

    async def main(reader):
        async with Pipeline(plan_for(folder, CPU, reader=reader)) as pipeline:
            return [tensor async for batch in pipeline.sweep() for tensor in batch.tensors.values()]

    for reader in ("direct", "mmap"):
        for tensor in run(main(reader)):
            tensor.sum()  # any bytes; but not a segmentation fault
