"""Counters and histograms in Prometheus' text format (version 0.0.4).

Labels are bounded: a model is one that is loaded, and its series go with it; everything else is a constant of ours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
DURATION = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Counter:
    """Sums by label values, in the order of `labels`."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self.name, self.text, self.labels = name, text, tuple(labels)
        self.values: dict[tuple[str, ...], float] = {}

    def add(self, amount: float, *labels: str) -> None:
        """Count."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def forget(self, label: str, value: str) -> None:
        """Drop the series in which `label` is `value`."""
        place = self.labels.index(label)
        self.values = {key: total for key, total in self.values.items() if key[place] != value}

    def lines(self) -> Iterator[str]:
        """As text."""
        yield from _head(self.name, self.text, "counter")
        for labels, total in self.values.items():
            yield f"{self.name}{_labels(self.labels, labels)} {total:.15g}"


class Histogram:
    """How many observations were at most so large, by one label."""

    def __init__(self, name: str, text: str, label: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self.label, self.bounds = name, text, label, tuple(bounds)
        self.counts: dict[str, list[int]] = {}
        self.sums: dict[str, float] = {}

    def observe(self, seconds: float, label: str) -> None:
        """Count one observation."""
        counts = self.counts.setdefault(label, [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, seconds)] += 1
        self.sums[label] = self.sums.get(label, 0.0) + seconds

    def lines(self) -> Iterator[str]:
        """As text: buckets are cumulative."""
        yield from _head(self.name, self.text, "histogram")
        for value, counts in self.counts.items():
            total = 0
            for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_labels((self.label, 'le'), (value, bound))} {total}"
            yield f"{self.name}_sum{_labels((self.label,), (value,))} {self.sums[value]:.6f}"
            yield f"{self.name}_count{_labels((self.label,), (value,))} {total}"


class Metrics:
    """What a server counts; written to by the event loop's thread alone."""

    def __init__(self) -> None:
        self.requests = Counter(
            "peftune_requests_total", "Requests answered, 499 where the client left before.",
            ("endpoint", "model", "status"),
        )  # fmt: skip
        self.cancelled = Counter("peftune_cancelled_total", "Texts given up before their end.", ("model",))
        self.prompt_tokens = Counter("peftune_prompt_tokens_total", "Tokens of accepted prompts.", ("model",))
        self.tokens = Counter("peftune_generation_tokens_total", "Tokens written.", ("model",))
        self.first_token = Histogram(
            "peftune_time_to_first_token_seconds", "From a request's arrival to its first token.", "endpoint",
            FIRST_TOKEN,
        )  # fmt: skip
        self.duration = Histogram(
            "peftune_request_duration_seconds", "From a request's arrival to its answer's end.", "endpoint", DURATION
        )

    def forget(self, model: str) -> None:
        """An adapter has gone: so do its series."""
        for counter in (self.requests, self.cancelled, self.prompt_tokens, self.tokens):
            counter.forget("model", model)

    def text(self, gauges: Sequence[tuple[str, str, float]]) -> str:
        """Everything, with `gauges` (name, text, value) that are read off elsewhere."""
        lines: list[str] = []
        for name, text, value in gauges:
            lines += [*_head(name, text, "counter" if name.endswith("_total") else "gauge"), f"{name} {value:.15g}"]
        for counter in (self.requests, self.cancelled, self.prompt_tokens, self.tokens):
            lines += counter.lines()
        for histogram in (self.first_token, self.duration):
            lines += histogram.lines()
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
