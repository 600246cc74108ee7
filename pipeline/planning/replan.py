"""The hardware for the next plan: with rates learnt from completed sweeps, as if the running plan did not run. Pure."""

import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.machine.measurement import ComputeRate, Figure, Origin, UnpackingRate
from layerstream.pipeline.planning.assumptions import Rates, rates_of
from layerstream.pipeline.planning.plan import Plan, ReaderKind
from layerstream.stages.experts.usage import ExpertUsage
from layerstream.stages.telemetry.spans import Span, StageTimings, SweepSpan
from layerstream.stages.telemetry.timings import Timings

__all__ = ["hardware_without", "learn"]

# Enough to show a rate, and not the latency of a few requests.
_LEAST_BYTES = 64 << 20
_STEP_RATES = (
    "step_attention_flops_per_second",
    "kv_growth_bytes_per_second",
    "blocks_per_second",
)
# At least this share of computation's time counts as work, even if hand-offs were predicted to take more.
_LEAST_WORK_SHARE = 0.2


def learn(
    hardware: Hardware,
    plan: Plan,
    timings: Timings,
    expert_usage: Mapping[str, ExpertUsage] = MappingProxyType({}),
) -> Hardware:
    """``hardware`` with the rates that the stages reached in ``timings``, marked as learnt.

    The rate of the disk is learnt from direct reads, and that of the link from copies to a GPU. The rates of
    computation are scaled by the times that the plan predicted for sweeps with a single forward pass, divided by the
    measured ones; those for other numbers of tokens are scaled like the nearest. Other rates stay as they were.

    Args:
        hardware: The hardware that ``plan`` was made with.
        plan: The plan that was run.
        timings: Those of the pipeline that ran it.
        expert_usage: How its tokens have chosen experts, by the paths of modules.
    """
    fields: dict[str, Any] = {}
    if expert_usage:
        fields["expert_usage"] = {**hardware.expert_usage, **expert_usage}
    if plan.reader is ReaderKind.DIRECT and (rate := _reached_rate(timings, stage=0)):
        fields["disk_bytes_per_second"] = rate
    if not plan.on_cpu and (rate := _reached_rate(timings, stage=1)):
        fields["h2d_bytes_per_second"] = rate
    known = rates_of(hardware)
    # A GPU computes while batches are handed over; on a CPU, the time with a batch includes the hand-off.
    overhead = known.overhead_seconds_per_batch if plan.on_cpu else 0.0
    if factors := _speed_factors(plan, timings, overhead_seconds=overhead):
        fields |= _scaled(known, hardware.unpacking, factors)
    figure = Figure(origin=Origin.LEARNT, samples=timings.sweeps, age_seconds=0.0)
    return replace(
        hardware,
        **fields,
        figures={**hardware.figures, **dict.fromkeys(fields, figure)},
    )


def hardware_without(
    plan: Plan, hardware: Hardware, *, now: Hardware, as_budgeted: bool
) -> Hardware:
    """``hardware`` with as much memory free as there would be if ``plan`` did not run.

    Args:
        plan: The running one.
        hardware: The hardware with the rates for the new plan.
        now: The hardware with the memory that is free while ``plan`` runs.
        as_budgeted: Count at least the budget of ``plan`` as free: some of it is used by running requests, but that
            is no reason to refuse the same budget again.
    """
    vram = None
    if now.vram_free_bytes is not None and plan.device_memory is not None:
        vram = now.vram_free_bytes + plan.device_memory.taken_bytes
        if as_budgeted:
            vram = max(vram, plan.device_memory.budget_bytes)
    host = now.host_available_bytes + plan.host_memory.taken_bytes
    if as_budgeted:
        beside_code = plan.host_memory.budget_bytes - plan.overhead_bytes
        host = max(host, beside_code, plan.host_memory.used_bytes)
    return replace(
        hardware, cached_bytes=now.cached_bytes, host_available_bytes=host, vram_free_bytes=vram
    )


def _steady_sweeps(timings: Timings) -> list[SweepSpan]:
    """The sweeps that are typical of later ones, and of which all spans were kept."""
    since = timings.complete_since_seconds
    return [sweep for sweep in timings.latest if sweep.steady and sweep.start_seconds >= since]


def _by_sweep(stage: StageTimings, sweeps: Sequence[SweepSpan]) -> list[StageTimings]:
    """The part of ``stage`` in each of ``sweeps``, which follow one another."""
    starts = [sweep.start_seconds for sweep in sweeps]
    stops = [sweep.stop_seconds for sweep in sweeps]
    spans: list[list[Span]] = [[] for _ in sweeps]
    for span in stage.spans:  # once, since there are as many for each sweep as there are layers
        first, behind = (
            bisect_left(stops, span.start_seconds),
            bisect_right(starts, span.stop_seconds),
        )
        for at in range(first, behind):
            spans[at].append(span)
    return [
        replace(stage, spans=tuple(each)).between(sweep.start_seconds, sweep.stop_seconds)
        for sweep, each in zip(sweeps, spans, strict=True)
    ]


def _reached_rate(timings: Timings, *, stage: int) -> float | None:
    """Bytes per second that a stage reached; None if it had too few bytes."""
    parts = _by_sweep(timings.stages[stage], _steady_sweeps(timings))
    nbytes, seconds = sum(part.bytes for part in parts), sum(part.busy_seconds for part in parts)
    return nbytes / seconds if nbytes >= _LEAST_BYTES and seconds > 0 else None


def _speed_factors(plan: Plan, timings: Timings, *, overhead_seconds: float) -> dict[int, float]:
    """How many times as fast as predicted passes were computed, by their number of tokens."""
    found = defaultdict(list)
    sweeps = [sweep for sweep in _steady_sweeps(timings) if sweep.tokens is not None]
    for sweep, stage in zip(sweeps, _by_sweep(timings.stages[2], sweeps), strict=True):
        assert sweep.tokens is not None  # noqa: S101 - see above
        predicted = _predicted_seconds(plan, sweep.tokens)
        # Of a mixture whose experts come on demand, the stage counts the bytes of the rest only.
        if (stage.bytes >= _LEAST_BYTES or plan.experts) and predicted > 0:
            seconds = _compute_seconds(stage, overhead_seconds, sweep.expert_wait_seconds)
            found[sweep.tokens].append(predicted / seconds)
    return {tokens: statistics.median(factors) for tokens, factors in found.items()}


def _predicted_seconds(plan: Plan, tokens: int) -> float:
    """Computation in a sweep of ``tokens``: between a decoding step and a prompt, interpolated linearly."""
    if plan.workload is None:
        return 0.0
    step_tokens = plan.workload.batch_size
    prompt_tokens = step_tokens * plan.workload.prompt_tokens
    step, prompt = (
        sweep.compute_seconds for sweep in (plan.prediction.decode, plan.prediction.prefill)
    )
    if tokens <= step_tokens or prompt_tokens == step_tokens:
        return step
    return step + (prompt - step) * (tokens - step_tokens) / (prompt_tokens - step_tokens)


def _compute_seconds(
    stage: StageTimings, overhead_seconds: float, expert_wait_seconds: float
) -> float:
    """The busy time of the compute stage without hand-offs, and without waiting for experts."""
    busy = max(stage.busy_seconds - expert_wait_seconds, 0.0) or stage.busy_seconds
    return max(busy - stage.items * overhead_seconds, _LEAST_WORK_SHARE * busy)


def _scaled(
    known: Rates, unpacking: Sequence[UnpackingRate], factors: dict[int, float]
) -> dict[str, Any]:
    """The rates of computation, by the names of Hardware's fields."""

    def nearest(tokens: int) -> float:
        return factors[min(factors, key=lambda size: abs(size - tokens))]

    return {
        "compute": tuple(
            ComputeRate(
                tokens=rate.tokens, bytes_per_second=rate.bytes_per_second * nearest(rate.tokens)
            )
            for rate in known.compute
        ),
        "unpacking": tuple(
            replace(each, bytes_per_second=each.bytes_per_second * factors[min(factors)])
            for each in unpacking
        ),
        # Attention matters in long prompts, the others in steps.
        "attention_flops_per_second": known.attention_flops_per_second * factors[max(factors)],
        **{name: getattr(known, name) * factors[min(factors)] for name in _STEP_RATES},
    }
