"""What a plan predicts of sweeps, and what was measured. Plain data."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

__all__ = ["PredictionCheck", "PredictionChecker", "SweepPrediction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPrediction:
    """The time of one sweep, and how long each stage is busy in it."""

    seconds: float
    read_seconds: float
    transfer_seconds: float
    compute_seconds: float
    overhead_seconds: float
    """Hand-offs, which computation waits for."""

    @property
    def bottleneck(self) -> str:
        """The stage that is busy the longest: "read", "transfer" or "compute"; or "hand-offs"."""
        return max(self._busy())[1]

    @property
    def ceiling(self) -> float:
        """How much faster overlapped stages can be than one after the other: (d+h+c) / max(d,h,c)."""
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
        """The sum of both."""
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
class PredictionCheck:
    """Sums over the completed sweeps: what the plan predicted, and what was measured."""

    sweeps: int
    predicted: SweepPrediction
    measured: SweepPrediction

    def errors(self) -> dict[str, float]:
        """The relative error of each prediction, left out where nothing was measured."""
        return {
            name: predicted / measured - 1
            for name, predicted, measured in self._pairs()
            if measured > 0
        }

    def lines(self) -> list[str]:
        """A line for the sweep and one for each stage: predicted, measured, and the error in per cent."""
        errors, count = self.errors(), max(self.sweeps, 1)
        return [
            f"{name:>8}: predicted {predicted / count:.3f} s per sweep, measured {measured / count:.3f} s"
            + (f" ({errors[name]:+.0%})" if name in errors else "")
            for name, predicted, measured in self._pairs()
            if predicted or measured
        ]

    def _pairs(self) -> list[tuple[str, float, float]]:
        """Name, predicted and measured seconds of the sweeps and of each stage."""
        predicted, measured = self.predicted, self.measured
        return [
            ("sweep", predicted.seconds, measured.seconds),
            ("read", predicted.read_seconds, measured.read_seconds),
            ("transfer", predicted.transfer_seconds, measured.transfer_seconds),
            ("compute", predicted.compute_seconds, measured.compute_seconds),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON; each key names its unit."""
        return {
            "sweeps": self.sweeps,
            "predicted": asdict(self.predicted),
            "measured": asdict(self.measured),
            "errors": self.errors(),
        }


class PredictionChecker:
    """Adds up the predictions of the sweeps that are completed.

    Args:
        on_gpu: Computation goes on during hand-offs, and its time is that of its kernels. On a CPU the compute stage
            is busy with the hand-off too, so its time is compared with the sum of both predictions.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._sweeps = 0
        self._seconds = 0.0
        self._predicted = SweepPrediction.nothing()

    def count(self, predicted: SweepPrediction, seconds: float) -> None:
        """Count a sweep that took ``seconds`` and for which ``predicted`` was predicted."""
        self._sweeps += 1
        self._seconds += seconds
        self._predicted = self._predicted.plus(predicted)

    def sums(
        self, *, read_seconds: float, transfer_seconds: float, compute_seconds: float
    ) -> PredictionCheck:
        """The sums so far, together with how long each stage was busy."""
        predicted = self._predicted
        hand_off_seconds = 0.0 if self._on_gpu else predicted.overhead_seconds
        return PredictionCheck(
            sweeps=self._sweeps,
            predicted=replace(
                predicted,
                compute_seconds=predicted.compute_seconds + hand_off_seconds,
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
