"""When the first token of an answer is expected, and the times of an answer."""

import time
from typing import TYPE_CHECKING

from layerstream.stages.telemetry.forecast import PredictionCheck

if TYPE_CHECKING:
    from layerstream.pipeline import Plan

__all__ = ["Stopwatch", "correction", "first_token_seconds"]


def correction(forecast: PredictionCheck | None) -> float:
    """How many times as long as predicted the sweeps so far have taken; 1 before there are any."""
    if forecast is None or forecast.predicted.seconds <= 0 or forecast.measured.seconds <= 0:
        return 1.0
    return forecast.measured.seconds / forecast.predicted.seconds


def first_token_seconds(
    plan: "Plan", *, prompt_tokens: int, sweeps: int, forecast: PredictionCheck | None
) -> float:
    """The expected time from a prompt to its first token, by the plan.

    Computation grows with the prompt, reading and copying do not. Once there were sweeps, the plan's predictions are
    corrected by what those have taken.

    Args:
        plan: The plan.
        prompt_tokens: Tokens of the prompt.
        sweeps: Sweeps that were begun before.
        forecast: What was predicted and measured so far.
    """
    predicted, step = plan.prediction.prefill, plan.prediction.decode
    if not sweeps:
        predicted = plan.prediction.first
    planned = 1 if plan.workload is None else plan.workload.prompt_tokens
    share = (prompt_tokens - 1) / max(planned - 1, 1)
    more = max(predicted.compute_seconds - step.compute_seconds, 0.0)
    compute = predicted.compute_seconds - more + more * share
    others = max(predicted.read_seconds, predicted.transfer_seconds)
    # What the stages wait for one another stays.
    waits = predicted.seconds - max(others, predicted.compute_seconds)
    return (max(others, compute) + waits) * correction(forecast)


class Stopwatch:
    """The times of one answer, from its making on."""

    def __init__(self) -> None:
        self._began_seconds = self._last_seconds = time.monotonic()
        self.first_seconds: float | None = None
        self.tokens = 0

    def token(self) -> None:
        """A token has come."""
        self._last_seconds = time.monotonic()
        self.tokens += 1
        if self.first_seconds is None:
            self.first_seconds = self.seconds

    @property
    def seconds(self) -> float:
        """From the beginning to the latest token."""
        return self._last_seconds - self._began_seconds

    @property
    def waited_seconds(self) -> float:
        """From the beginning to now."""
        return time.monotonic() - self._began_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first per second; over all if there is only one."""
        first = self.first_seconds or 0.0
        if self.tokens > 1 and self.seconds > first:
            return (self.tokens - 1) / (self.seconds - first)
        return self.tokens / self.seconds if self.seconds else 0.0
