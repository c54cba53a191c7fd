"""What a benchmark found: contestants with medians and spread, gates, and rows: a figure against what is wanted."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.harness.machine import describe
from benchmarks.harness.workers import ROOT, Contestant


@dataclass(frozen=True)
class Spread:
    """Median of the rounds, lowest and highest beside it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(over: Contestant, under: Contestant) -> Spread | None:
    """Ratio of the medians; low and high are those of ratios within a round. None where one of the two did not run."""
    if not over.rounds or not under.rounds:
        return None
    each = [a / b for a, b in zip(over.values(), under.values(), strict=False)]
    return Spread(statistics.median(over.values()) / statistics.median(under.values()), min(each), max(each))


def fastest(contestants: Sequence[Contestant]) -> Contestant | None:
    """The best peer by median, or None where none ran."""
    return max((c for c in contestants if c.rounds), key=lambda c: statistics.median(c.values()), default=None)


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured against what is wanted; `reason` for a miss, or for not running."""

    target: str
    what: str
    against: str
    measured: Spread | None
    wanted: float
    sense: Literal["at least", "at most", "information"]
    unit: str = "times"
    reason: str = ""

    @property
    def status(self) -> str:
        """met, missed, not run, or information (no target)."""
        if self.measured is None:
            return "not run"
        if self.sense == "information":
            return self.sense
        median = self.measured.median
        return "met" if (median >= self.wanted if self.sense == "at least" else median <= self.wanted) else "missed"

    def verdict(self) -> str:
        """`4.7 (4.5 to 4.9) times, wanted at least 4: met`, with the reason where there is one."""
        reason = f" ({self.reason})" if self.reason else ""
        if self.measured is None:
            return f"not run{reason}"
        wanted = "" if self.sense == "information" else f", wanted {self.sense} {number(self.wanted)}: {self.status}"
        return f"{self.measured} {self.unit}{wanted}{reason}"


@cache
def targets() -> dict[str, Any]:
    """benchmarks/targets.yaml: the goals, and the rows of the chart."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "benchmarks" / "targets.yaml").read_text(encoding="utf-8"))
    return found


def row(
    key: str, what: str, against: str, values: Sequence[float], unit: str = "times", reason: str | None = None
) -> Row:
    """A row whose goal stands under `key` in targets.yaml, or that has none; the key's first word is the target."""
    sense, _, wanted = targets()["goals"].get(key, "information 0").rpartition(" ")
    measured = spread(values) if values else None
    return Row(key.split()[0], what, against, measured, float(wanted), sense, unit, reason or "")


def compare(key: str, what: str, over: Contestant, under: Contestant, against: str | None = None) -> Row:
    """A row of the ratio of two contestants, named after the second unless `against` is given."""
    found = row(key, what, against or under.name, [], reason=under.failure or over.failure)
    return replace(found, measured=ratio(over, under))


@dataclass
class Result:
    """Everything one benchmark found."""

    target: str
    title: str
    settings: dict[str, Any]
    gate: dict[str, Any] | None = None
    """The check that what is timed is right; None where the target is no training step."""
    contestants: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=describe)
    notes: list[str] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False

    def add(self, contestants: Sequence[Contestant]) -> Result:
        """Keep what these found, every round of it."""
        for c in contestants:
            figures = asdict(spread(c.values())) if c.rounds else None
            self.contestants.append({
                "name": c.name, "unit": c.unit, **c.facts, "figures": figures, "rounds": c.rounds, "failure": c.failure,
            })  # fmt: skip
        return self

    def values(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self) | {"rows": [asdict(row) | {"status": row.status} for row in self.rows]}

    def description(self) -> str:
        """The result as lines of text."""
        verdicts = [f"→ {row.what} against {row.against}: {row.verdict()}" for row in self.rows]
        return "\n".join([*details(self.values()), "", *verdicts])


def table_row(cells: Sequence[str]) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def details(result: dict[str, Any]) -> list[str]:
    """Settings, gate, contestants and notes of a result, as lines of Markdown."""
    lines = ["", f"### {result['target']}: {result['title']}", ""]
    lines += [f"- {key}: {_flat(value)}" for key, value in result["settings"].items()]
    if result["gate"]:
        lines.append(f"- gate, before any timing: {_flat(result['gate'])}")
    if result["contestants"]:
        lines += ["", "| contestant | median (lowest to highest) | settings |", "|---|---|---|"]
    lines += [table_row([c["name"], figure(c), _flat(c.get("settings", {}))]) for c in result["contestants"]]
    return [*lines, *(f"\n{note}" for note in result["notes"])]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items() if inner not in (None, {}, []))
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)


def figure(contestant: dict[str, Any]) -> str:
    """Median and spread with the unit, or why there is none."""
    figures = contestant["figures"]
    return f"{Spread(**figures)} {contestant['unit']}" if figures else f"not run: {contestant['failure']}"


def number(value: float) -> str:
    """Three significant digits, without an exponent where a person would not write one."""
    if abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@contextmanager
def drawn(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1) -> Iterator[list[Any]]:
    """The axes of a picture, which is written to `path` (png, svg) at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    yield list(axes.flat)
    figure.savefig(path, dpi=150)
    plt.close(figure)
