"""What sweeps that were run tell of the machine, in place of what was probed or assumed."""

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

# What shows a rate, and not the time of a few requests.
_LEAST_BYTES = 64 << 20
# Of computation's time, at least so much is taken to be work, however much its hand-offs were thought to be.
_LEAST_WORK = 0.2


def learn(hardware: Hardware, plan: Plan, timings: Timings) -> Hardware:
    """``hardware`` with the rates that the stages reached in ``timings``, marked as learnt.

    The disk's rate is learnt from direct reads, the link's from copies to a GPU, and computation's from sweeps
    with one forward pass each, for its number of tokens; rates for other numbers move in proportion. What
    ``timings`` do not show stays as it was.

    Args:
        hardware: what was known before.
        plan: that was run.
        timings: of the pipeline that ran it.
    """
    fields: dict[str, Any] = {}
    if plan.reader is ReaderKind.DIRECT and (rate := _link(timings, stage=0)):
        fields["disk_bytes_per_second"] = rate
    if plan.device_memory is not None and (rate := _link(timings, stage=1)):
        fields["h2d_bytes_per_second"] = rate
    known = rates_of(hardware)
    # A GPU computes while batches are handed over; a processor's time with a batch has that in it.
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
    """The sweeps that show what goes on showing, of which every span was kept."""
    since = timings.complete_since_seconds
    return [sweep for sweep in timings.latest if sweep.steady and sweep.start_seconds >= since]


def _link(timings: Timings, *, stage: int) -> float | None:
    """Bytes per second that a stage reached; None where too little went through it."""
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
    """``known`` and ``learnt`` rates; the known ones in proportion to the learnt one that is nearest."""
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
