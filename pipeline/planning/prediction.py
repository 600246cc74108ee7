"""A plan's predictions: times, the candidates that it was chosen from, and what would help. Plain data."""

from dataclasses import dataclass
from enum import StrEnum

from layerstream.stages.telemetry.forecast import SweepPrediction

__all__ = ["Advice", "Candidate", "Objective", "Prediction", "SweepPrediction"]


class Objective(StrEnum):
    """What a plan is optimised for."""

    LATENCY = "latency"  # one request on a newly opened pipeline: loading residents counts
    THROUGHPUT = "throughput"  # many requests one after the other: only what repeats counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted times of the workload."""

    objective: Objective
    first: SweepPrediction  # the very first sweep: it fills the pipeline and reads everything
    second: SweepPrediction  # the next one: on a CPU it loads the residents
    prefill: SweepPrediction  # the prompt of a later request
    decode: SweepPrediction  # each further token
    request_seconds: float  # for prompt and new tokens, counted according to the objective
    tokens_per_second: float  # while decoding, over all sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan that was considered."""

    name: str  # what is special about it; empty for most
    layer_batch_size: int
    slots: int
    reader: str
    host_used_bytes: int
    vram_used_bytes: int
    resident_batches: int
    batches: int
    sweep_seconds: float  # of decoding
    request_seconds: float
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The predicted effect of one change, all else equal."""

    change: str
    sweep_seconds: float  # of decoding
    tokens_per_second: float
    request_seconds: float
