"""A plan's predictions: times, the candidates that it was chosen from, and advice. Plain data."""

from dataclasses import dataclass
from enum import StrEnum

from layerstream.stages.errors import PlanError
from layerstream.stages.telemetry.forecast import SweepPrediction

__all__ = ["Advice", "Candidate", "Objective", "Prediction", "SweepPrediction"]


class Objective(StrEnum):
    """What a plan is optimised for."""

    LATENCY = "latency"
    """One request on a newly opened pipeline: loading residents counts."""
    THROUGHPUT = "throughput"
    """Many requests one after the other: only what repeats counts."""

    @classmethod
    def of(cls, given: "Objective | str") -> "Objective":
        """The objective that is called ``given``.

        Raises:
            PlanError: There is none.
        """
        if given not in list(cls):
            raise PlanError(f"objective {given!r} is unknown; use one of {', '.join(cls)}")
        return cls(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted times of the workload."""

    objective: Objective
    first: SweepPrediction
    """The very first sweep: it fills the pipeline and reads everything."""
    second: SweepPrediction
    """The next one: on a CPU it loads the residents."""
    prefill: SweepPrediction
    """The prompt of a later request."""
    decode: SweepPrediction
    """Each further token."""
    request_seconds: float
    """For prompt and new tokens, counted according to the objective."""
    tokens_per_second: float
    """While decoding, over all sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan that was considered."""

    name: str
    """What is special about it; empty for most."""
    layer_batch_size: int
    slots: int
    reader: str
    host_used_bytes: int
    vram_used_bytes: int
    resident_batches: int
    batches: int
    sweep_seconds: float
    """Of decoding."""
    request_seconds: float
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The predicted effect of one change, all else equal."""

    change: str
    sweep_seconds: float
    """Of decoding."""
    tokens_per_second: float
    request_seconds: float
