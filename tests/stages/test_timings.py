"""Timings: no moment is counted twice, traces agree with the sums, and the bottleneck is named correctly."""

import asyncio
import json
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.checkpoints import CPU, GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.loop import run

from layerstream.pipeline import Pipeline
from layerstream.stages.telemetry.clock import Clock, Gauge
from layerstream.stages.telemetry.forecast import PredictionChecker, SweepPrediction
from layerstream.stages.telemetry.spans import Activity, StageTimings
from layerstream.stages.telemetry.timings import Timings

BLOCKS = 6
BATCHES = BLOCKS + 2


def count_tensors(batch, seen):
    return seen + len(batch.tensors)


def compute_slowly(batch, seen):
    """Computation that takes long compared with reading a few kilobytes."""
    matrix = torch.ones(400, 400)
    for _ in range(20):
        matrix = (matrix @ matrix).clamp(0, 1)
    return seen + len(batch.tensors)


async def swept(plan, compute=count_tensors, *, sweeps=4, device=None):
    """Timings of whole sweeps, and of those after the first."""
    async with Pipeline(plan, device=device) as pipeline:
        await pipeline.run(compute, 0)
        start = time.perf_counter()
        for _ in range(sweeps - 1):
            await pipeline.run(compute, 0)
        timings = pipeline.timings()
        return timings, timings.between(start, time.perf_counter(), sweeps=sweeps - 1)


def slow_disk(folder):
    """A plan whose reads take far longer than everything else: 1 MB/s, tens of milliseconds for each batch."""
    plan = arranged(plan_for(folder, CPU, reader="throttled"))
    return replace(plan, throttle_bytes_per_second=1e6)


RESIDENTS = {
    "streamed": {},
    "one slot": {"slots": 1},
    "some resident": {"on_host": (1, 4), "on_device": (2,)},
    "all resident": {"on_device": range(BATCHES)},
}


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "fake"])
@pytest.mark.parametrize("residents", RESIDENTS.values(), ids=RESIDENTS)
def test_a_trace_has_a_track_for_each_stage_and_slot_without_overlaps_and_adds_up_to_the_sums(
    tmp_path, hardware, residents
):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    plan = arranged(plan_for(tmp_path, hardware), **residents)
    device = None if hardware is CPU else FakeDevice()
    timings, _ = run(swept(plan, device=device))
    timings.write_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    tracks = {
        event["args"]["name"]: event["tid"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert list(tracks)[:3] == ["read", "transfer", "compute"]
    slots = [name for name in tracks if "slots" in name]
    assert slots == list(tracks)[3:]
    assert slots or residents
    for track in tracks.values():
        held = [event for event in trace["traceEvents"] if event["tid"] == track and "ts" in event]
        held.sort(key=lambda span: (span["ts"], span["dur"]))
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in pairwise(held))
    for stage in timings.stages:
        spans = [
            event
            for event in trace["traceEvents"]
            if event["ph"] == "X" and event["tid"] == tracks[stage.name]
        ]
        assert all(span["dur"] >= 0 for span in spans)
        summed = dict.fromkeys(Activity, 0.0)
        for span in spans:
            summed[span["cat"]] += span["dur"] / 1e6
        assert summed[Activity.WORKING] == pytest.approx(stage.busy_seconds, abs=1e-5)
        assert summed[Activity.WAITING_IN] == pytest.approx(stage.waited_in_seconds, abs=1e-5)
        assert summed[Activity.WAITING_OUT] == pytest.approx(stage.waited_out_seconds, abs=1e-5)
        assert sum(span["args"]["bytes"] for span in spans) == stage.bytes
        assert sum(summed.values()) <= timings.wall_seconds + 1e-5
    computed = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "working"]
    assert "2 model.layers.1" in computed


def test_with_a_slow_disk_reading_is_named_and_hides_everything_else(tmp_path):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    plan = slow_disk(tmp_path)
    _, steady = run(swept(plan))
    assert 0.9 <= steady.overlap_efficiency <= 1.0
    read, _, compute = steady.stages
    assert read.bytes == pytest.approx(3 * plan.disk_bytes_per_sweep, rel=0.1)
    assert compute.items == 3 * BATCHES
    assert steady.bottleneck().name == "read"
    assert "read holds the sweeps back" in steady.summary()
    assert "faster disk" in steady.summary()


def test_with_a_heavy_computation_computing_is_named(tmp_path):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    _, steady = run(swept(arranged(plan_for(tmp_path, CPU)), compute_slowly))
    assert steady.bottleneck().name == "compute"
    assert "faster device" in steady.summary()


def stage(name, busy, waited_in=0.0):
    return StageTimings(
        name=name,
        items=1,
        bytes=1,
        busy_seconds=busy,
        waited_in_seconds=waited_in,
        waited_out_seconds=0.0,
    )


BOTTLENECKS = {
    "read": ((9.5, 1.0, 1.0, 9.0), "read", "a faster disk"),
    "transfer": ((1.0, 9.5, 1.0, 9.0), "transfer", "larger VRAM budget"),
    "compute": ((1.0, 1.0, 9.5, 0.5), "compute", "a faster device"),
    "in part": ((7.0, 1.0, 3.0, 7.0), "read", "more slots"),
    "hand-offs": ((3.0, 1.0, 2.0, 8.0), "read", "larger layer batches"),
    "between sweeps": ((1.0, 0.0, 7.0, 0.1), "compute", "29% pass between sweeps"),
    "the caller": ((1.0, 1.0, 1.0, 1.0), "caller", "nobody asked for a sweep"),
}


@pytest.mark.parametrize("case", BOTTLENECKS)
def test_the_bottleneck_says_what_to_change(case):
    (read, transfer, compute, waited), name, words = BOTTLENECKS[case]
    stages = (stage("read", read), stage("transfer", transfer), stage("compute", compute, waited))
    found = Timings(sweeps=1, wall_seconds=10.0, stages=stages).bottleneck()
    assert found.name == name
    assert words in found.sentence
    assert "What helps: " in found.sentence


def test_before_any_work_there_is_no_bottleneck():
    timings = Timings(sweeps=0, wall_seconds=0.0, stages=(Clock("read").sums(),))
    assert (timings.overlap_efficiency, timings.bottleneck().name) == (0.0, "nothing")
    assert "nothing has been streamed yet" in timings.summary()


def test_a_stretch_of_time_takes_its_share_of_the_spans_that_reach_into_it():
    clock = Clock("read")
    clock.add(Activity.WORKING, 0.0, 2.0, batch=0, nbytes=100)
    clock.add(Activity.WAITING_OUT, 2.0, 3.0, batch=1)
    clock.add(Activity.WORKING, 3.0, 7.0, batch=1, nbytes=400)
    part = clock.sums().between(1.0, 4.0)
    assert (part.busy_seconds, part.waited_out_seconds, part.bytes, part.items) == (2, 1, 150, 1)


def test_sums_stay_exact_when_the_oldest_spans_are_dropped():
    clock = Clock("read")
    for second in range(10_000):
        clock.add(Activity.WORKING, second, second + 1, batch=0, nbytes=3)
    sums = clock.sums()
    assert (sums.items, sums.bytes, sums.busy_seconds) == (10_000, 30_000, 10_000)
    timings = Timings(sweeps=1, wall_seconds=10_000, stages=(sums,))
    assert len(sums.spans) < 10_000
    assert timings.complete_since_seconds == sums.spans[0].start_seconds == 10_000 - len(sums.spans)


COPY, KERNEL = 0.01, 0.04
CLOCK_READS = 1e-3  # more than all reads of a scripted clock take together


def compute_on(device, clock, streams=1):
    """A computation of one kernel for each stream, which the host launches without waiting for it.

    Time stands still until all have been launched, and does not go on after the last: whatever else is waited
    for, these kernels do not finish.
    """
    others = [device.new_stream() for _ in range(streams - 1)]

    def compute(batch, seen):
        clock.stop()
        for stream in (device.stream(), *others):
            with device.computing_on(stream):
                assert batch.tensors
                device.launch(lambda: None, seconds=KERNEL)
        if seen + 1 < 2 * BATCHES:
            clock.go_on()
        return seen + 1

    return compute


@pytest.mark.parametrize("streams", [1, 3])
def test_spans_are_the_devices_times_and_those_of_kernels_side_by_side_count_once(
    tmp_path, clock, streams
):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    plan = arranged(plan_for(tmp_path, GPU), slots=2)
    device = FakeDevice(clock=clock, copy_seconds=COPY)

    async def main():
        async with Pipeline(plan, device=device) as pipeline:
            try:
                compute = compute_on(device, clock, streams)
                await pipeline.run(compute, await pipeline.run(compute, 0))
                returned = time.perf_counter()
                before = pipeline.timings().stages[2]
            finally:
                clock.go_on()
            await asyncio.to_thread(device.drain)
            return returned, before, pipeline.timings()

    returned, before, timings = run(main())
    _, transfer, compute = timings.stages
    assert before.items < compute.items == 2 * BATCHES
    assert compute.spans[-1].stop_seconds > returned
    # Copies wait for the kernel that reads their slot; that wait is not work.
    assert transfer.busy_seconds == pytest.approx(transfer.items * COPY, abs=CLOCK_READS)
    assert transfer.waited_out_seconds >= KERNEL - COPY - CLOCK_READS
    # A copy may end between the hand-over of a batch and the launch of its kernels.
    busy = compute.busy_seconds / compute.items
    assert KERNEL - CLOCK_READS <= busy <= KERNEL + COPY + CLOCK_READS
    assert compute.busy_seconds + compute.waited_in_seconds <= timings.wall_seconds + 1e-6
    for stage in timings.stages:
        assert all(a.stop_seconds <= b.start_seconds for a, b in pairwise(stage.spans))


def test_a_caller_who_keeps_a_batch_is_computing_however_fast_the_device_is(tmp_path, clock):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    device = FakeDevice(clock=clock)

    async def main():
        async with Pipeline(arranged(plan_for(tmp_path, GPU)), device=device) as pipeline:
            began = time.perf_counter()
            async for batch in pipeline.sweep():
                assert batch.tensors
                clock.go_to(time.perf_counter() + KERNEL)
            return began, time.perf_counter(), pipeline.timings()

    began, ended, timings = run(main())
    assert timings.between(began, ended, sweeps=1).bottleneck().name == "compute"


PREDICTED = SweepPrediction(
    seconds=1.0,
    read_seconds=0.5,
    transfer_seconds=0.5,
    compute_seconds=0.3,
    overhead_seconds=0.2,
)


@pytest.mark.parametrize(("on_gpu", "seconds"), [(False, 0.5), (True, 0.3)])
def test_a_processors_time_is_compared_with_hand_offs_and_a_gpus_without(on_gpu, seconds):
    checker = PredictionChecker(on_gpu=on_gpu)
    checker.count(PREDICTED, 1.0)
    check = checker.sums(read_seconds=0.5, transfer_seconds=0.5, compute_seconds=seconds)
    assert check.errors()["compute"] == pytest.approx(0.0)


def test_work_that_a_failed_device_never_finishes_is_dropped_and_earlier_work_counts():
    clock = Clock("compute")

    def counted(clock):
        clock.add(Activity.WORKING, 0.0, 1.0, batch=0)
        return True

    clock.add_later(counted)
    for _ in range(5000):
        clock.add_later(lambda _: False)
    assert clock.sums().items == 1
    assert len(clock._pending) < 2000


def test_occupancy_stays_within_the_ring(tmp_path):
    write_checkpoint(tmp_path, blocks=BLOCKS)
    timings, _ = run(swept(arranged(plan_for(tmp_path, GPU)), device=FakeDevice()))
    assert [each.name for each in timings.occupancy] == ["host slots", "device slots"]
    for each in timings.occupancy:
        assert 0 < each.mean_bytes <= each.peak_bytes <= each.capacity_bytes


def test_a_gauge_remembers_its_peak():
    gauge = Gauge()
    for by in (3, 4, -5):
        gauge.change(by)
    assert gauge.peak == 7
    assert 0 <= gauge.mean() <= 7
