"""The completed sweeps of a pipeline: how many, how long each took, and what was predicted."""

import time
from collections import deque
from collections.abc import Sequence

from layerstream.pipeline.planning.prediction import Prediction
from layerstream.stages.compute import Sweep
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.telemetry.clock import Clock
from layerstream.stages.telemetry.forecast import PredictionChecker, SweepPrediction
from layerstream.stages.telemetry.spans import ExpertCounts, Occupancy, StageTimings, SweepSpan
from layerstream.stages.telemetry.timings import Timings

__all__ = ["SweepLog"]

# How many of the latest sweeps timings list one by one: enough to learn rates from.
_SWEEPS_KEPT = 64


class SweepLog:
    """Counts the completed sweeps of a pipeline.

    Args:
        on_gpu: Computation continues on the device while batches are handed over.

    Attributes:
        loading: Whether the sweep under way loads residents.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self.loading = False
        self._completed = 0
        self._expert_wait_seconds = 0.0
        self._predictions = PredictionChecker(on_gpu=on_gpu)
        self._latest: deque[SweepSpan] = deque(maxlen=_SWEEPS_KEPT)

    def count(self, sweep: Sweep, prediction: Prediction, experts: ExpertStore | None) -> None:
        """Count ``sweep``, which is complete."""
        now = time.perf_counter()
        waited = 0.0 if experts is None else experts.counts().wait_seconds
        predicted = self._prediction_of(prediction, prompt=sweep.prompt)
        self._predictions.count(predicted, now - sweep.began_seconds)
        self._latest.append(
            SweepSpan(
                start_seconds=sweep.began_seconds,
                stop_seconds=now,
                tokens=sweep.tokens,
                steady=self._completed > 0 and not self.loading,
                expert_wait_seconds=waited - self._expert_wait_seconds,
            )
        )
        self._expert_wait_seconds = waited
        self._completed += 1

    def _prediction_of(self, prediction: Prediction, *, prompt: bool) -> SweepPrediction:
        if not self._completed:
            return prediction.first
        if self.loading:
            return prediction.second
        return prediction.prefill if prompt else prediction.decode

    def timings(
        self,
        clocks: Sequence[Clock],
        *,
        opened_seconds: float,
        labels: tuple[str, ...],
        occupancy: tuple[Occupancy, ...],
        experts: ExpertCounts | None,
        unpacking: StageTimings | None,
    ) -> Timings:
        """What the stages of ``clocks`` did in these sweeps, since ``opened_seconds``."""
        stages = tuple(clock.sums() for clock in clocks)
        last = max(clock.last_stop_seconds for clock in clocks)
        busy = {f"{stage.name}_seconds": stage.busy_seconds for stage in stages}
        return Timings(
            sweeps=self._completed,
            wall_seconds=max(0.0, last - opened_seconds),
            stages=stages,
            start_seconds=opened_seconds,
            latest=tuple(self._latest),
            forecast=self._predictions.sums(**busy),
            labels=labels,
            occupancy=occupancy,
            experts=experts,
            unpacking=unpacking,
        )
