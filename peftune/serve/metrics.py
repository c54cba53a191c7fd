"""What a server counts, for Prometheus.

Labels are bounded: `model` is one that is loaded, and its series are dropped with it; the other labels are constants.
"""

from __future__ import annotations

from collections.abc import Iterator

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peftune.serve.backend import ServedModels, TextEngine

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_DURATION = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics(Collector):
    """Counters and histograms in a registry of their own: one process may hold several servers."""

    def __init__(self, bank: ServedModels, engine: TextEngine) -> None:
        self._bank, self._engine = bank, engine
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "peftune_requests_total", "Requests answered; status 499 where the client disconnected before.",
            "endpoint", "model", "status",
        )  # fmt: skip
        self.cancelled = self._counter("peftune_cancelled_total", "Choices cancelled before they were complete.")
        self.prompt_tokens = self._counter("peftune_prompt_tokens_total", "Tokens of accepted prompts.")
        self.generation_tokens = self._counter("peftune_generation_tokens_total", "Tokens generated.")
        self.routed = self._counter("peftune_routed_total", "Prompts that the model auto sent to this model.")
        self.queue_time = self._seconds(
            "peftune_request_queue_time_seconds", "From a choice's acceptance to its slot.", _FIRST_TOKEN, "model"
        )
        self.routing = self._seconds(
            "peftune_routing_seconds", "In which the model auto chose, the wait for its turn included.", _FIRST_TOKEN
        )
        self.first_token = self._seconds(
            "peftune_time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN,
            "endpoint", "model",
        )  # fmt: skip
        self.inter_token = self._seconds(
            "peftune_inter_token_latency_seconds", "From a choice's token to its next one.", _INTER_TOKEN, "model"
        )
        self.duration = self._seconds(
            "peftune_request_duration_seconds", "From a request's arrival to the end of its response.", _DURATION,
            "endpoint",
        )  # fmt: skip
        self.registry.register(self)

    def remove_model(self, model: str) -> None:
        """Drop the series of an adapter that was unloaded."""
        counters = (self.requests, self.cancelled, self.prompt_tokens, self.generation_tokens, self.routed)
        for series in (*counters, self.queue_time, self.first_token, self.inter_token):
            series.remove_by_labels({"model": model})

    def collect(self) -> Iterator[Metric]:
        """The engine's load when Prometheus asks."""
        load = self._engine.load
        yield GaugeMetricFamily("peftune_requests_running", "Sequences in the batch.", load.running)
        yield GaugeMetricFamily("peftune_requests_waiting", "Sequences without a slot yet.", load.waiting)
        yield GaugeMetricFamily("peftune_requests_routing", "Of those waiting, prompts that auto routes.", load.routing)
        yield GaugeMetricFamily("peftune_slots", "Slots of the batch.", load.slots)
        yield GaugeMetricFamily("peftune_engines", "Engines that answer.", load.engines)
        yield GaugeMetricFamily("peftune_adapters_loaded", "Adapters in memory.", len(self._bank.names))
        yield CounterMetricFamily("peftune_engine_steps", "Forward passes of the batch.", load.steps)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        """By model, unless it has other labels."""
        return Counter(name, description, labels or ("model",), registry=self.registry)

    def _seconds(self, name: str, description: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, description, labels, buckets=buckets, registry=self.registry)
