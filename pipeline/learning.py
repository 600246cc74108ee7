"""Learns rates of the machine from completed sweeps, in place of probed or assumed ones."""

import statistics
from collections import defaultdict
from dataclasses import replace
from typing import Any

from layerstream.pipeline.figures import ComputeRate, Figure, Origin
from layerstream.pipeline.hardware import Hardware
from layerstream.pipeline.plan import Plan, ReaderKind
from layerstream.pipeline.rates import Rates, rates_of
from layerstream.stages.timings import StageTimings, SweepSpan, Timings

__all__ = ["learn"]

# Enough to show a rate, and not the latency of a few requests.
_LEAST_BYTES = 64 << 20
# At least this share of computation's time counts as work, even if hand-offs were predicted to take more.
_LEAST_WORK = 0.2


def learn(hardware: Hardware, plan: Plan, timings: Timings) -> Hardware:
    """``hardware`` with the rates that the stages reached in ``timings``, marked as learnt.

    The rate of the disk is learnt from direct reads, that of the link from copies to a GPU, and that of computation from
    sweeps with a single forward pass, for its number of tokens; rates for other numbers change in proportion. What
    ``timings`` do not show stays as it was.

    Args:
        hardware: with the rates known before.
        plan: the one that was run.
        timings: of the pipeline that ran it.
    """
    fields: dict[str, Any] = {}
    if plan.reader is ReaderKind.DIRECT and (rate := _link(timings, stage=0)):
        fields["disk_bytes_per_second"] = rate
    if plan.device_memory is not None and (rate := _link(timings, stage=1)):
        fields["h2d_bytes_per_second"] = rate
    known = rates_of(hardware)
    # A GPU computes while batches are handed over; on a CPU, the time with a batch includes the hand-off.
    on_cpu = plan.device_memory is None
    learnt = _compute(timings, overhead_seconds=known.overhead_seconds_per_batch if on_cpu else 0.0)
    if learnt:
        fields["compute"] = _merged(known, learnt)
    figure = Figure(origin=Origin.LEARNT, samples=timings.sweeps, age_seconds=0.0)
    return replace(
        hardware,
        **fields,
        figures={**hardware.figures, **dict.fromkeys(fields, figure)},
    )


def _steady(timings: Timings) -> list[SweepSpan]:
    """The sweeps that are typical of later ones, and of which all spans were kept."""
    since = timings.complete_since_seconds
    return [sweep for sweep in timings.latest if sweep.steady and sweep.start_seconds >= since]


def _link(timings: Timings, *, stage: int) -> float | None:
    """Bytes per second that a stage reached; None if it had too few bytes."""
    passed = [
        timings.stages[stage].between(sweep.start_seconds, sweep.stop_seconds)
        for sweep in _steady(timings)
    ]
    nbytes, seconds = sum(each.bytes for each in passed), sum(each.busy_seconds for each in passed)
    return nbytes / seconds if nbytes >= _LEAST_BYTES and seconds > 0 else None


def _compute(timings: Timings, *, overhead_seconds: float) -> dict[int, float]:
    """Bytes of weights per second, by the tokens of a pass."""
    found = defaultdict(list)
    for sweep in _steady(timings):
        if sweep.tokens is None:
            continue
        stage = timings.stages[2].between(sweep.start_seconds, sweep.stop_seconds)
        if stage.bytes >= _LEAST_BYTES:
            found[sweep.tokens].append(_rate(stage, overhead_seconds))
    return {tokens: statistics.median(rates) for tokens, rates in found.items()}


def _rate(stage: StageTimings, overhead_seconds: float) -> float:
    handed_over = stage.items * overhead_seconds
    return stage.bytes / max(stage.busy_seconds - handed_over, _LEAST_WORK * stage.busy_seconds)


def _merged(known: Rates, learnt: dict[int, float]) -> tuple[ComputeRate, ...]:
    """``known`` and ``learnt`` rates; known ones are scaled like the nearest learnt one."""
    factors = {tokens: rate / known.weights_per_second(tokens) for tokens, rate in learnt.items()}
    merged = {
        rate.tokens: rate.bytes_per_second
        * factors[min(factors, key=lambda size: abs(size - rate.tokens))]
        for rate in known.compute
    }
    merged.update(learnt)
    return tuple(
        ComputeRate(tokens=tokens, bytes_per_second=rate) for tokens, rate in sorted(merged.items())
    )
