"""What monitors of the service ask: metrics for Prometheus, whether anything moves, and an id for each request."""

import re
import time
import uuid
from collections.abc import Callable, Sequence

import prometheus_client
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from layerstream.pipeline import StreamedModel
from layerstream.tools.metrics import StatsCollector
from layerstream.tools.serving.loop_lag import LoopLag

__all__ = ["Metrics", "Movement", "Timeline", "Traced"]

# Weights in memory make a token in milliseconds, those of the largest models on a slow disk in an hour.
_LAGS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Movement:
    """Whether a model that has requests does anything. It is looked at only when somebody asks, as monitors often do."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._seen: object = None
        self._since_seconds = time.monotonic()

    def still_seconds(self) -> float:
        """Seconds for which no layer batch and no token has come, as far as was looked at; 0 without a request."""
        stats, now = self._model.stats(), time.monotonic()
        stages = [(stage.items, stage.bytes) for stage in self._model.timings().stages]
        seen = stages, stats.tokens_generated, stats.sweeps, stats.passes
        if seen != self._seen or not stats.requests_riding + stats.requests_waiting:
            self._seen, self._since_seconds = seen, now
        return now - self._since_seconds


class Metrics:
    """The metrics of one service.

    Args:
        model: The model, open.
        movement: Tells how long nothing has moved.
        open_answers: Returns the number of answers that run or wait.
    """

    def __init__(
        self, model: StreamedModel, movement: Movement, *, open_answers: Callable[[], int]
    ) -> None:
        self._registry = registry = prometheus_client.CollectorRegistry()
        registry.register(StatsCollector(model.stats))
        for name, meaning, function in (
            ("open_answers", "Answers that run or wait", open_answers),
            (
                "still_seconds",
                "Time in which nothing has moved for requests",
                movement.still_seconds,
            ),
        ):
            gauge = prometheus_client.Gauge(f"layerstream_{name}", meaning, registry=registry)
            gauge.set_function(function)

        def histogram(
            name: str, meaning: str, buckets: Sequence[float] = _BUCKETS
        ) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(
                f"layerstream_{name}_seconds", meaning, buckets=buckets, registry=registry
            )

        self.queue = histogram("queue", "From an answer's request to the start of its first pass")
        self.first_token = histogram("first_token", "From an answer's request to its first token")
        self.token = histogram("token", "Between two tokens of an answer")
        lag = histogram("loop_lag", "How late the event loop was, while it had requests", _LAGS)
        self.loop_lag = LoopLag(lag.observe)
        self.tokens = prometheus_client.Counter(
            "layerstream_answer_tokens",
            "Tokens of answers, by the name of the model that was asked for, which may be an adapter's",
            ["model"],
            registry=registry,
        )
        self.responses = prometheus_client.Counter(
            "layerstream_responses",
            "Responses by path and status; refusals are those of 400 and above",
            ["path", "status"],
            registry=registry,
        )

    def text(self) -> bytes:
        """The metrics in Prometheus' format."""
        return prometheus_client.generate_latest(self._registry)


class Timeline:
    """Measures the times of one answer, from its making on."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._asked_seconds = time.monotonic()
        self._last_seconds: float | None = None  # of the latest token

    def begun(self) -> None:
        """Its first pass begins."""
        self._metrics.queue.observe(time.monotonic() - self._asked_seconds)

    def token(self) -> None:
        """A token has come."""
        now = time.monotonic()
        if self._last_seconds is None:
            self._metrics.first_token.observe(now - self._asked_seconds)
        else:
            self._metrics.token.observe(now - self._last_seconds)
        self._last_seconds = now


class Traced:
    """Middleware that gives each response the id of its request, the client's own or a new one, and counts it.

    As long as there are requests, it measures the loop's lag.

    Args:
        app: The app.
        metrics: Count responses.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
                # The path of the route, not the client's: of those there may be any number.
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        with self._metrics.loop_lag.measured():
            await self._app(scope, receive, send_with_id)
