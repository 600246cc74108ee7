"""How far the answers to a request are, and when more is expected: by its own pace, before it has one by the plan's.

The plan's is corrected by what the sweeps of earlier requests have taken.
"""

import time
from collections.abc import Sequence

from layerstream.pipeline import StreamedModel
from layerstream.tools.running.answer_times import correction

__all__ = ["Progress"]

# The weight of the latest interval between two tokens in their mean.
_LATEST = 0.3


class Progress:
    """Counts the tokens of the answers to one request.

    Args:
        model: The model that generates them.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._tokens: list[int] = []
        self._limits: Sequence[int] = ()
        self._last_seconds = time.monotonic()  # of the latest token, or of the start
        self._interval: float | None = None

    def start(self, limits: Sequence[int]) -> None:
        """The answers are about to begin; ``limits`` are their maximums of tokens."""
        self._limits, self._tokens = limits, [0] * len(limits)
        self._last_seconds = time.monotonic()

    def count(self, index: int, tokens: int) -> None:
        """Answer ``index`` has ``tokens`` more."""
        first = not any(self._tokens)
        further = self._tokens[index] == max(self._tokens, default=0)
        self._tokens[index] += tokens
        if not further or not tokens:  # answers to one request go side by side
            return
        now = time.monotonic()
        interval, self._last_seconds = now - self._last_seconds, now
        if not first:
            mean = interval if self._interval is None else self._interval
            self._interval = mean + _LATEST * (interval - mean)

    @property
    def seconds_to_token(self) -> float:
        """Seconds until the next token is expected; below zero if it is late."""
        return self._expected_seconds() - (time.monotonic() - self._last_seconds)

    @property
    def seconds_to_end(self) -> float:
        """Seconds until the last answer is expected to reach its maximum of tokens."""
        pairs = zip(self._limits, self._tokens, strict=True)
        left = max((limit - done for limit, done in pairs), default=0)
        return max(0.0, self.seconds_to_token) + max(0, left - 1) * self._token_seconds()

    def describe(self) -> str:
        """Describe it in one line, such as "sweep 12 of 64, 41 s to the next token"."""
        done, limit = max(self._tokens, default=0), max(self._limits, default=1)
        seconds = self.seconds_to_token
        which = "next" if done else "first"
        due = (
            f"{seconds:.0f} s to the {which} token"
            if seconds >= 0
            else f"the {which} token is {-seconds:.0f} s late"
        )
        waiting = 0 if done else self._model.stats().requests_waiting
        queue = f"; {waiting} requests wait for memory or a free place" if waiting else ""
        return f"sweep {min(done + 1, limit)} of {limit}, {due}{queue}"

    def _expected_seconds(self) -> float:
        if any(self._tokens):
            return self._token_seconds()
        prediction = self._model.plan.prediction
        if not self._model.stats().sweeps:
            return prediction.first.seconds
        return prediction.prefill.seconds * self._correction()

    def _token_seconds(self) -> float:
        return self._interval or self._model.plan.prediction.decode.seconds * self._correction()

    def _correction(self) -> float:
        return correction(self._model.timings().forecast)
