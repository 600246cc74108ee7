"""Rates learnt from completed sweeps: a plan made with them predicts the measured times."""

import dataclasses

import pytest
from support.checkpoints import CPU, GPU

from layerstream.pipeline import Checkpoint, Hardware, Plan, Workload, make_plan
from layerstream.pipeline.machine.measurement import ComputeRate, Origin
from layerstream.pipeline.planning.replan import _by_sweep, learn
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.spans import Activity, SweepSpan
from layerstream.stages.telemetry.timings import Timings
from layerstream.tools.synthetic.checkpoints import CheckpointSpec, make_checkpoint
from layerstream.tools.synthetic.families import FAMILIES, scaled

PROMPT = 256
OVERHEAD = 1e-3
KNOWN = {
    "disk_bytes_per_second": 1e9,
    "h2d_bytes_per_second": 1e10,
    "compute": tuple(
        ComputeRate(tokens=tokens, bytes_per_second=rate)
        for tokens, rate in ((1, 2e10), (16, 1.5e10), (256, 2e9))
    ),
    "attention_flops_per_second": 2e11,
    "step_attention_flops_per_second": 5e9,
    "kv_growth_bytes_per_second": 5e9,
    "blocks_per_second": 5000.0,
    "direct_read_cpu_seconds_per_byte": 0.0,
    "overhead_seconds_per_batch": OVERHEAD,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The headers of a model of 240 MB."""
    family = FAMILIES["llama-3.1-8b"]
    spec = CheckpointSpec(
        family="llama-3.1-8b",
        config=scaled(family.config, layers=8, hidden=1024, vocab=4096),
        dtype="bfloat16",
        max_shard_bytes=1 << 30,
        seed=0,
        sparse=True,
    )
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("model"), spec).folder)


def planned(checkpoint: Checkpoint, hardware: Hardware) -> Plan:
    workload = Workload(prompt_tokens=PROMPT, new_tokens=8)
    return make_plan(checkpoint, hardware, workload=workload, reader="direct", layer_batch_size=1)


def timings_of(plan: Plan, *, times: dict[int, float], overhead_seconds: float) -> Timings:
    """Timings of a sweep for each number of tokens in ``times``, with its seconds of computation."""
    clocks = [Clock(name) for name in ("read", "transfer", "compute")]
    now, sweeps = 0.0, []
    batches = len(plan.batches)
    for tokens, seconds in times.items():
        each = seconds / batches + overhead_seconds
        start = now
        for batch in plan.batches:
            stop = now + each
            clocks[2].add(Activity.WORKING, now, stop, batch=batch.index, nbytes=batch.tensor_bytes)
            now = stop
        sweeps.append(SweepSpan(start_seconds=start, stop_seconds=now, tokens=tokens, steady=True))
    return Timings(
        sweeps=len(sweeps),
        wall_seconds=now,
        stages=tuple(clock.sums() for clock in clocks),
        latest=tuple(sweeps),
    )


def test_a_stage_is_divided_by_sweeps_wherever_its_spans_begin_and_end():
    clock = Clock("read")
    edges = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.5]
    for start in edges:  # overlapping ones, as of several reads in flight, and empty ones
        for stop in edges:
            if start <= stop:
                clock.add(Activity.WORKING, start, stop, batch=0, nbytes=1000)
    bounds = [(0.5, 1.0), (1.0, 2.0), (2.5, 2.5), (3.0, 4.0)]
    sweeps = [
        SweepSpan(start_seconds=start, stop_seconds=stop, tokens=1, steady=True)
        for start, stop in bounds
    ]
    stage = clock.sums()
    assert _by_sweep(stage, sweeps) == [stage.between(*each) for each in bounds]


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("times", [0.5, 2.0])
def test_a_new_plan_predicts_the_computation_as_it_was_measured(checkpoint, machine, times):
    hardware = dataclasses.replace(machine, **KNOWN)
    plan = planned(checkpoint, hardware)
    before = plan.prediction
    timings = timings_of(
        plan,
        times={
            1: times * before.decode.compute_seconds,
            PROMPT: times * before.prefill.compute_seconds,
        },
        overhead_seconds=OVERHEAD if machine is CPU else 0.0,
    )
    learnt = learn(hardware, plan, timings)
    after = planned(checkpoint, learnt).prediction
    assert after.decode.compute_seconds == pytest.approx(times * before.decode.compute_seconds)
    assert after.prefill.compute_seconds == pytest.approx(times * before.prefill.compute_seconds)
    for name in ("compute", "attention_flops_per_second", "blocks_per_second"):
        assert learnt.figures[name].origin is Origin.LEARNT


def test_prompts_and_steps_are_learnt_separately(checkpoint):
    hardware = dataclasses.replace(CPU, **KNOWN)
    plan = planned(checkpoint, hardware)
    before = plan.prediction
    measured = {1: 0.5 * before.decode.compute_seconds, PROMPT: 3 * before.prefill.compute_seconds}
    timings = timings_of(plan, times=measured, overhead_seconds=OVERHEAD)
    after = planned(checkpoint, learn(hardware, plan, timings)).prediction
    # Attention is assumed to be as fast in steps as it was in the prompt.
    assert after.decode.compute_seconds == pytest.approx(measured[1], rel=0.06)
    assert after.prefill.compute_seconds == pytest.approx(measured[PROMPT], rel=0.05)


def test_passes_of_other_sizes_are_compared_with_times_between_those_of_a_step_and_of_a_prompt(
    checkpoint,
):
    hardware = dataclasses.replace(CPU, **KNOWN)
    plan = planned(checkpoint, hardware)
    step, prompt = (
        each.compute_seconds for each in (plan.prediction.decode, plan.prediction.prefill)
    )
    middle = step + (prompt - step) * (100 - 1) / (PROMPT - 1)
    timings = timings_of(plan, times={100: 2 * middle}, overhead_seconds=OVERHEAD)
    rates = {each.tokens: each.bytes_per_second for each in learn(hardware, plan, timings).compute}
    assert rates == {
        each.tokens: pytest.approx(each.bytes_per_second / 2) for each in KNOWN["compute"]
    }


def test_nothing_is_learnt_of_computation_from_sweeps_with_several_passes(checkpoint):
    hardware = dataclasses.replace(CPU, **KNOWN)
    plan = planned(checkpoint, hardware)
    timings = timings_of(plan, times={1: 5.0}, overhead_seconds=OVERHEAD)
    shared = dataclasses.replace(timings.latest[0], tokens=None)
    learnt = learn(hardware, plan, dataclasses.replace(timings, latest=(shared,)))
    assert learnt.compute == hardware.compute
