"""What the machine does now, as JSON: for the page, and for whoever wants to draw it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from layerstream.pipeline import Stats, StreamedModel
from layerstream.pipeline.report.layer_map import legend, memory_parts, place_of
from layerstream.pipeline.report.plan_report import summarize_plan
from layerstream.stages.telemetry.spans import Activity, Span, StageTimings
from layerstream.stages.telemetry.timings import Timings

__all__ = ["MachineState", "stage_shares"]

_WINDOW_SECONDS = 10
_BUCKETS = 100
_ACTIVITIES = (Activity.WORKING, Activity.WAITING_IN, Activity.WAITING_OUT)


class MachineState:
    """Describes a model's plan and what it is doing.

    Args:
        model: The model, open.
        name: Its name for clients.
        max_answers: Maximum of answers that run or wait.
        open_answers: Returns the number of answers that run or wait.
        trouble: Returns what is wrong with the service; None if nothing is.
    """

    def __init__(
        self,
        model: StreamedModel,
        *,
        name: str,
        max_answers: int,
        open_answers: Callable[[], int],
        trouble: Callable[[], str | None],
    ) -> None:
        self._model = model
        self._name = name
        self._max_answers = max_answers
        self._open_answers = open_answers
        self._trouble = trouble

    async def respond(self) -> Response:
        """Respond with the state as JSON, with units in the keys."""
        timings, stats = self._model.timings(), self._model.stats()
        # Thousands of spans: not on the event loop.
        return JSONResponse(await asyncio.to_thread(self._to_json, timings, stats))

    def _to_json(self, timings: Timings, stats: Stats) -> dict[str, Any]:
        plan = self._model.plan
        return {
            "model": self._name,
            "trouble": self._trouble(),
            "plan": summarize_plan(plan),
            "stats": stats.to_dict(),
            "queue": {
                "running": stats.requests_riding,
                "waiting": stats.requests_waiting,
                "open_answers": self._open_answers(),
                "max_answers": self._max_answers,
            },
            "forecast": _forecast(timings),
            "window_seconds": _WINDOW_SECONDS,
            "stages": _stages(timings),
            "layers": [
                {
                    "label": batch.label,
                    "layers": len(batch.layers),
                    "bytes": batch.read_bytes,
                    "place": place_of(plan, batch),
                }
                for batch in plan.batches
            ],
            "legend": legend(plan),
            "memory": self._memory(stats),
        }

    def _memory(self, stats: Stats) -> list[dict[str, Any]]:
        """What is held now: requests with what they have reserved, all else as planned."""
        plan, sides = self._model.plan, []
        caches, in_use = stats.reserved_cache_bytes, plan.device_memory or plan.host_memory
        for name, memory in plan.memories.items():
            parts = memory_parts(memory)
            parts.pop("workload")
            if memory is in_use:
                parts["requests"] = stats.reserved_bytes - caches
            elif caches:
                parts["requests"] = caches
            sides.append(
                {
                    "name": name[:1].upper() + name[1:],
                    "budget_bytes": memory.budget_bytes,
                    "parts": [{"name": part, "bytes": nbytes} for part, nbytes in parts.items()],
                }
            )
        return sides


def _forecast(timings: Timings) -> dict[str, float] | None:
    """Seconds of the sweeps so far, on average; None before the first."""
    check = timings.forecast
    if check is None or not check.sweeps:
        return None
    return {
        "predicted_seconds": check.predicted.seconds / check.sweeps,
        "measured_seconds": check.measured.seconds / check.sweeps,
    }


def _stages(timings: Timings) -> list[dict[str, Any]]:
    now = time.perf_counter()  # the clock of spans
    return [_stage(stage, now) for stage in timings.stages]


def _stage(stage: StageTimings, now: float) -> dict[str, Any]:
    latest = [span for span in stage.spans if span.stop_seconds > now - _WINDOW_SECONDS]
    shares = stage_shares(latest, start=now - _WINDOW_SECONDS, stop=now, buckets=_BUCKETS)
    sums = [sum(each) / _BUCKETS for each in zip(*shares, strict=True)]
    nbytes = sum(span.nbytes for span in latest)
    working = [span.batch for span in latest if span.activity is Activity.WORKING]
    return {
        "name": stage.name,
        "batch": working[-1] if working else -1,
        "bytes_per_second": nbytes / _WINDOW_SECONDS,
        **{
            f"{name}_share": share
            for name, share in zip(("busy", "waiting_in", "waiting_out"), sums, strict=True)
        },
        "buckets": [[round(share, 3) for share in each] for each in shares],
    }


def stage_shares(
    spans: Sequence[Span], *, start: float, stop: float, buckets: int
) -> list[list[float]]:
    """For each of ``buckets`` equal parts of the time, which shares of it a stage worked and waited: in, out."""
    shares = [[0.0] * len(_ACTIVITIES) for _ in range(buckets)]
    per_second = buckets / (stop - start)
    for span in spans:
        if span.activity not in _ACTIVITIES:
            continue
        kind = _ACTIVITIES.index(span.activity)
        first = max(0.0, (span.start_seconds - start) * per_second)
        last = min(float(buckets), (span.stop_seconds - start) * per_second)
        for index in range(int(first), buckets):
            if index >= last:
                break
            shares[index][kind] += min(last, index + 1) - max(first, index)
    return shares
