"""Counters and gauges of a streamed model, for monitoring."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from layerstream.stages.telemetry.timings import Timings

__all__ = ["Counters", "Outcome", "StageUse", "Stats"]

Outcome = Literal["completed", "cancelled", "failed"]  # how a request ends


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """How busy one stage of the pipeline has been since the model was opened."""

    name: str
    utilisation: float
    """Of the time that passed, from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a model has done since it was opened, and what it is doing now. Made by ``StreamedModel.stats``."""

    # Counters: they only grow.
    sweeps: int
    """Begun; forward passes share them."""
    passes: int
    """Forward passes that were begun."""
    # Of tasks and threads. A pass of the drop-in outside ``generate`` is a request too.
    requests_started: int
    """Admitted, however they ended."""
    requests_completed: int
    requests_cancelled: int
    """By their callers, while they waited or ran."""
    requests_failed: int
    """With an error of the model or of the pipeline."""
    requests_refused: int
    """They could never fit, or came when the model was closing."""
    prompts_chunked: int
    """Processed in pieces, because their activations did not fit."""
    tokens_generated: int
    """By ``generate`` and ``stream``, over all sequences of a batch."""
    bytes_read: int
    """Of weights, by the read stage."""
    # Gauges: as things are now.
    requests_waiting: int
    """For memory or for a place."""
    requests_riding: int
    """Admitted and not ended."""
    riders_aboard: int
    """Forward passes in the sweep under way."""
    # KV cache and activations of those that run; with KV caches in host RAM, their larger shares of either memory
    reserved_bytes: int
    reservable_bytes: int
    """The memory for that."""
    open_seconds: float
    stages: tuple[StageUse, ...]

    @property
    def tokens_per_sweep(self) -> float:
        """Tokens per sweep on average, over all requests; 0 before any sweep."""
        return self.tokens_generated / self.sweeps if self.sweeps else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read from disk for each token; 0 before any token."""
        return self.bytes_read / self.tokens_generated if self.tokens_generated else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON; each key carries its unit."""
        return {
            **asdict(self),
            "stages": [asdict(stage) for stage in self.stages],
            "tokens_per_sweep": self.tokens_per_sweep,
            "bytes_per_token": self.bytes_per_token,
        }


@dataclass(slots=True)
class Counters:
    """The counters of ``Stats`` for requests. Written on the event loop only."""

    started: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    chunked: int = 0
    tokens: int = 0
    """Of requests that have ended."""

    def ended(self, outcome: Outcome, *, tokens: int) -> None:
        """Count a request that has ended after generating ``tokens``."""
        self.tokens += tokens
        self.completed += outcome == "completed"
        self.cancelled += outcome == "cancelled"
        self.failed += outcome == "failed"

    def stats(
        self,
        timings: Timings,
        *,
        tokens: int,
        sweeps: int,
        passes: int,
        waiting: int,
        riding: int,
        aboard: int,
        reserved_bytes: int,
        reservable_bytes: int,
    ) -> Stats:
        """The counters together with those kept elsewhere."""
        seconds = max(timings.wall_seconds, 1e-9)
        return Stats(
            sweeps=sweeps,
            passes=passes,
            requests_started=self.started,
            requests_completed=self.completed,
            requests_cancelled=self.cancelled,
            requests_failed=self.failed,
            requests_refused=self.refused,
            prompts_chunked=self.chunked,
            tokens_generated=tokens,
            bytes_read=timings.stages[0].bytes,
            requests_waiting=waiting,
            requests_riding=riding,
            riders_aboard=aboard,
            reserved_bytes=reserved_bytes,
            reservable_bytes=reservable_bytes,
            open_seconds=timings.wall_seconds,
            stages=tuple(
                StageUse(name=stage.name, utilisation=min(1.0, stage.busy_seconds / seconds))
                for stage in timings.stages
            ),
        )
