"""A streamed model's statistics as Prometheus metrics. Needs the extra ``serve``, but no running service.

registry = CollectorRegistry()
registry.register(StatsCollector(model.stats))
generate_latest(registry)
"""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from layerstream.pipeline import Stats

__all__ = ["StatsCollector"]

# Metric name without "layerstream_", its description, and the field of Stats. Prometheus appends "_total" to counters.
_COUNTERS = (
    ("sweeps", "Sweeps over the weights", "sweeps"),
    ("passes", "Forward passes begun; they share sweeps", "passes"),
    ("requests_started", "Requests admitted", "requests_started"),
    ("requests_completed", "Requests that ended normally", "requests_completed"),
    ("requests_cancelled", "Requests cancelled by their callers", "requests_cancelled"),
    ("requests_failed", "Requests that failed", "requests_failed"),
    ("requests_refused", "Requests that would never have fitted", "requests_refused"),
    ("prompts_chunked", "Prompts read in pieces to save memory", "prompts_chunked"),
    ("generated_tokens", "Tokens generated", "tokens_generated"),
    ("read_bytes", "Bytes of weights read", "bytes_read"),
    ("experts_wanted", "Experts that forward passes needed, in each layer", "experts_wanted"),
    ("reopened", "Times that the model was reopened after streaming had failed", "reopened"),
    ("expert_hits", "Of those, the ones that were in memory, on a GPU in VRAM", "expert_hits"),
)
_GAUGES = (
    ("requests_waiting", "Requests that wait for memory or a free place", "requests_waiting"),
    ("requests_riding", "Requests that are running", "requests_riding"),
    ("riders_aboard", "Forward passes in the current sweep", "riders_aboard"),
    (
        "reserved_bytes",
        "Memory reserved for KV cache and activations of running requests",
        "reserved_bytes",
    ),
    ("reservable_bytes", "Memory that requests can reserve", "reservable_bytes"),
    ("tokens_per_sweep", "Tokens for each sweep, on average", "tokens_per_sweep"),
    ("bytes_per_token", "Bytes read for each token, on average", "bytes_per_token"),
    ("open_seconds", "Time since the model was opened", "open_seconds"),
)


class StatsCollector(Collector):
    """Exports what ``StreamedModel.stats`` returns at the time of each scrape."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def describe(self) -> Iterator[Metric]:
        """Describe no metrics, which keeps the registry from calling ``collect`` on registration."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield all counters and gauges."""
        stats = self._stats()
        for name, meaning, field in _COUNTERS:
            yield CounterMetricFamily(
                f"layerstream_{name}", meaning, value=float(getattr(stats, field))
            )
        for name, meaning, field in _GAUGES:
            yield GaugeMetricFamily(
                f"layerstream_{name}", meaning, value=float(getattr(stats, field))
            )
        yield GaugeMetricFamily(
            "layerstream_failed",
            "Whether streaming has failed, so that nothing is answered until the model is reopened",
            value=float(stats.failure is not None),
        )
        yield GaugeMetricFamily(
            "layerstream_hanging_reads",
            "Reads of the weight files that have not returned for long",
            value=float(len(stats.hanging_reads)),
        )
        busy = GaugeMetricFamily(
            "layerstream_stage_utilisation_ratio",
            "Share of the time that a stage was busy, since the model was opened",
            labels=["stage"],
        )
        for stage in stats.stages:
            busy.add_metric([stage.name], stage.utilisation)
        yield busy
