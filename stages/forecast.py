"""What a plan says of sweeps, and what came of it. Plain data."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

__all__ = ["Forecast", "Forecasts", "SweepPrediction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPrediction:
    """The time of one sweep, and what each stage is busy for meanwhile."""

    seconds: float
    read_seconds: float
    transfer_seconds: float
    compute_seconds: float
    overhead_seconds: float  # hand-offs, which computation waits for

    @property
    def bottleneck(self) -> str:
        """The stage that is busy the longest: "read", "transfer" or "compute"; or "hand-offs"."""
        return max(self._busy())[1]

    @property
    def ceiling(self) -> float:
        """How many times faster overlapping can be than one stage after another: (d+h+c) / max(d,h,c)."""
        longest = max(self._busy()[:3])[0]
        total = self.read_seconds + self.transfer_seconds + self.compute_seconds
        return total / longest if longest else 1.0

    @classmethod
    def nothing(cls) -> Self:
        """No time at all."""
        return cls(
            seconds=0.0,
            read_seconds=0.0,
            transfer_seconds=0.0,
            compute_seconds=0.0,
            overhead_seconds=0.0,
        )

    def plus(self, other: Self) -> Self:
        """Both, one after the other."""
        return replace(
            self,
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            },
        )

    def _busy(self) -> list[tuple[float, str]]:
        return [
            (self.read_seconds, "read"),
            (self.transfer_seconds, "transfer"),
            (self.compute_seconds, "compute"),
            (self.overhead_seconds, "hand-offs"),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The sweeps that were completed, and what the plan had said of each of them, in sum."""

    sweeps: int
    predicted: SweepPrediction
    measured: SweepPrediction

    def errors(self) -> dict[str, float]:
        """By how much each prediction was off, as a share of what was measured; of what took no time, nothing."""
        pairs = {
            "sweep": (self.predicted.seconds, self.measured.seconds),
            "read": (self.predicted.read_seconds, self.measured.read_seconds),
            "transfer": (self.predicted.transfer_seconds, self.measured.transfer_seconds),
            "compute": (self.predicted.compute_seconds, self.measured.compute_seconds),
        }
        return {name: said / took - 1 for name, (said, took) in pairs.items() if took > 0}

    def lines(self) -> list[str]:
        """A line for the sweep and one for each stage: predicted, measured, and the error in per cent."""
        rows = (
            ("sweep", self.predicted.seconds, self.measured.seconds),
            ("read", self.predicted.read_seconds, self.measured.read_seconds),
            ("transfer", self.predicted.transfer_seconds, self.measured.transfer_seconds),
            ("compute", self.predicted.compute_seconds, self.measured.compute_seconds),
        )
        errors, count = self.errors(), max(self.sweeps, 1)
        return [
            f"{name:>8}: predicted {said / count:.3f} s per sweep, measured {took / count:.3f} s"
            + (f" ({errors[name]:+.0%})" if name in errors else "")
            for name, said, took in rows
            if said or took
        ]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON; each key carries its unit."""
        return {
            "sweeps": self.sweeps,
            "predicted": asdict(self.predicted),
            "measured": asdict(self.measured),
            "errors": self.errors(),
        }


class Forecasts:
    """Adds up what the plan says of the sweeps that are completed.

    Args:
        on_gpu: computation goes on while batches are handed over, and its time is that of its kernels. A processor
            holds a batch meanwhile, so that its time is compared with both.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._sweeps = 0
        self._seconds = 0.0
        self._said = SweepPrediction.nothing()

    def count(self, said: SweepPrediction, seconds: float) -> None:
        """A sweep took ``seconds``."""
        self._sweeps += 1
        self._seconds += seconds
        self._said = self._said.plus(said)

    def sums(
        self, *, read_seconds: float, transfer_seconds: float, compute_seconds: float
    ) -> Forecast:
        """All so far, beside what each stage was busy for meanwhile."""
        said = self._said
        handed_over = 0.0 if self._on_gpu else said.overhead_seconds
        return Forecast(
            sweeps=self._sweeps,
            predicted=replace(
                said,
                compute_seconds=said.compute_seconds + handed_over,
                overhead_seconds=0.0,
            ),
            measured=SweepPrediction(
                seconds=self._seconds,
                read_seconds=read_seconds,
                transfer_seconds=transfer_seconds,
                compute_seconds=compute_seconds,
                overhead_seconds=0.0,
            ),
        )
