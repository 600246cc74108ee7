"""From timings: what holds the sweeps back, and what to change."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.stages.telemetry.spans import StageTimings

__all__ = ["Bottleneck", "find_bottleneck", "overlap_efficiency"]

# A stage that is busy for this share of the time hides the others.
_DOMINATES = 0.9
# If the busiest stage is busy for less than this, most of the time goes to hand-offs, not to work.
_MOST = 0.5
# A share of idle time between sweeps that is worth reporting.
_REPORTED = 0.05

_REMEDIES = {
    "read": "a faster disk, or a larger host budget, which keeps more layers in RAM",
    "transfer": "a faster link to the device, or a larger VRAM budget, which keeps more layers on it",
    "compute": "a faster device or more of its threads; weights arrive in time, so faster disks bring nothing",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What takes the largest part of the time."""

    name: str
    """The stage; "caller" if no sweep was requested most of the time; "nothing" before any work."""
    share: float
    """Its share of the time that passed."""
    sentence: str
    """What it is, and what to change."""


def overlap_efficiency(stages: Sequence[StageTimings], *, wall_seconds: float) -> float:
    """The busiest stage's busy time divided by the time that passed: 1.0 if all else is hidden behind it."""
    busiest = max((stage.busy_seconds for stage in stages), default=0.0)
    return busiest / wall_seconds if wall_seconds > 0 else 0.0


def find_bottleneck(stages: Sequence[StageTimings], *, wall_seconds: float) -> Bottleneck:
    """What takes the largest part of ``wall_seconds``, according to the timings of ``stages``."""
    longest = max(stages, key=lambda stage: stage.busy_seconds, default=None)
    if longest is None or not longest.items or wall_seconds <= 0:
        return Bottleneck(name="nothing", share=0.0, sentence="nothing has been streamed yet")
    share = overlap_efficiency(stages, wall_seconds=wall_seconds)
    idle = _idle_share(stages, wall_seconds)
    if idle > max(share, _MOST):
        sentence = (
            f"for {idle:.0%} of the time nobody asked for a sweep: the caller holds things back. "
            "What helps: asking for the next sweep sooner"
        )
        return Bottleneck(name="caller", share=idle, sentence=sentence)
    within = share / max(1 - idle, share)  # of the time in which there was a sweep
    if within >= _DOMINATES:
        words, remedy = "holds the sweeps back", _REMEDIES.get(longest.name, "making it faster")
    elif within >= _MOST:
        words = "is the longest stage, but the stages overlap only in part"
        remedy = "more slots (a larger budget or a smaller layer batch size); then a faster stage"
    else:
        words = "is the longest stage, but most of the time goes to hand-offs and waiting in turn"
        remedy = "larger layer batches, and memory for several of them"
    between = f", and {idle:.0%} pass between sweeps" if idle >= _REPORTED else ""
    sentence = (
        f"{longest.name} {words}: busy {share:.0%} of the time{between}. What helps: {remedy}"
    )
    return Bottleneck(name=longest.name, share=share, sentence=sentence)


def _idle_share(stages: Sequence[StageTimings], wall_seconds: float) -> float:
    """The share of the time in which no sweep was requested: computation neither worked nor waited for weights."""
    for stage in stages:
        if stage.name == "compute":
            in_sweeps = stage.busy_seconds + stage.waited_in_seconds + stage.waited_out_seconds
            return max(0.0, 1 - in_sweeps / wall_seconds)
    return 0.0
