"""What callers may choose about a plan. Plain data."""

import math
from dataclasses import dataclass, field

from layerstream.pipeline.planning.kernels import Kernels
from layerstream.pipeline.planning.plan import Budget, ReaderKind, Workload
from layerstream.pipeline.planning.prediction import Objective
from layerstream.stages.errors import PlanError

__all__ = ["LEAST_SLOTS", "PlanChoices", "reader_kind"]

# With a single slot the stages wait for one another; it is for when no more fit.
LEAST_SLOTS, _MOST_SLOTS = 1, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoices:
    """What a caller asks of a plan; the arguments of ``make_plan``, which explains them. None: the planner's choice.

    Raises:
        PlanError: One is invalid.
    """

    budget: Budget = field(default_factory=Budget)
    workload: Workload | None = None
    objective: Objective = Objective.LATENCY
    reader: ReaderKind | None = None
    throttle_bytes_per_second: float | None = None
    layer_batch_size: int | None = None
    slots: int | None = None
    kernels: Kernels = Kernels.EXACT

    def __post_init__(self) -> None:
        size = self.layer_batch_size
        if size is not None and not _is_whole(size):
            raise PlanError(f"layer_batch_size is {size!r}, but must be a whole number from 1")
        if self.slots is not None and not (_is_whole(self.slots) and self.slots <= _MOST_SLOTS):
            raise PlanError(f"slots is {self.slots!r}, but must be {LEAST_SLOTS} to {_MOST_SLOTS}")


def reader_kind(given: ReaderKind | str | None, rate: float | None) -> ReaderKind | None:
    """The reader that is called ``given``, which reads at most at ``rate`` if it is throttled.

    Raises:
        PlanError: There is none, or the two contradict one another.
    """
    # Written so that NaN is refused too; JSON knows no infinity.
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
        raise PlanError(f"throttle_bytes_per_second is {rate!r}, but must be a number above zero")
    if given is None:
        return None if rate is None else ReaderKind.THROTTLED
    if given not in list(ReaderKind):
        raise PlanError(f"reader {given!r} is unknown; use one of {', '.join(ReaderKind)}")
    kind = ReaderKind(given)
    if (kind is ReaderKind.THROTTLED) != (rate is not None):
        raise PlanError("the throttled reader and throttle_bytes_per_second go together")
    return kind


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
