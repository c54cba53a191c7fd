"""What a target found: contestants with medians and spread, gates, and rows: a ratio against what is wanted."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.machine import describe
from benchmarks.rounds import Contestant

Sense = Literal["at least", "at most", "information"]
_SMALLEST, _LARGEST = 0.01, 1000.0


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


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured against what is wanted; `reason` for a miss, or for not running."""

    target: str
    what: str
    against: str
    measured: Spread | None
    wanted: float
    sense: Sense
    unit: str = "times"
    reason: str = ""

    @property
    def status(self) -> str:
        """met, missed, not run, or information (no target)."""
        if self.measured is None:
            return "not run"
        if self.sense == "information":
            return self.sense
        reached = (
            self.measured.median >= self.wanted if self.sense == "at least" else self.measured.median <= self.wanted
        )
        return "met" if reached else "missed"


@dataclass
class Result:
    """Everything one target's command found."""

    target: str
    title: str
    settings: dict[str, Any]
    gate: dict[str, Any] | None = None
    """The check that what is timed is right; None where the target is no training step."""
    contestants: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=describe)
    notes: list[str] = field(default_factory=list)

    def add(self, contestants: Sequence[Contestant]) -> None:
        """Keep what these found, every round of it."""
        for c in contestants:
            figures = asdict(spread(c.values())) if c.rounds else None
            self.contestants.append({
                "name": c.name, "unit": c.unit, **c.facts, "figures": figures, "rounds": c.rounds, "failure": c.failure,
            })  # fmt: skip


def finish(result: Result, path: Path | None) -> None:
    """Print the result for people; with a path also write it for machines."""
    print(told(result))
    if path is not None:
        values = asdict(result)
        for row, kept in zip(result.rows, values["rows"], strict=True):
            kept["status"] = row.status
        path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {path}", file=sys.stderr)


def told(result: Result) -> str:
    """The result as lines of text."""
    lines = [f"{result.target}: {result.title}", *(f"  {key}: {value}" for key, value in result.settings.items())]
    if result.gate:
        lines.append("  gate: " + ", ".join(f"{key} {value}" for key, value in result.gate.items()))
    for c in result.contestants:
        found = Spread(**c["figures"]) if c["figures"] else c["failure"]
        lines.append(f"  {c['name']}: {found}{' ' + c['unit'] if c['figures'] else ''}")
    lines += [f"  → {row.what} against {row.against}: {verdict(row)}" for row in result.rows]
    return "\n".join([*lines, *(f"  note: {note}" for note in result.notes)])


def verdict(row: Row) -> str:
    """`4.7 times (4.5 to 4.9), wanted at least 4: met`, with the reason where there is one."""
    reason = f" ({row.reason})" if row.reason else ""
    if row.measured is None:
        return f"not run{reason}"
    wanted = "" if row.sense == "information" else f", wanted {row.sense} {number(row.wanted)}: {row.status}"
    low_high = f" ({number(row.measured.low)} to {number(row.measured.high)})"
    return f"{number(row.measured.median)} {row.unit}{low_high}{wanted}{reason}"


def number(value: float) -> str:
    """Three significant digits, without an exponent where a person would not write one."""
    if abs(value) < _SMALLEST:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= _LARGEST / 10 else f"{value:.3g}"
