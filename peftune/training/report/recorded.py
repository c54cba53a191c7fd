"""What a run has left on the disk so far, finished or not, whole or damaged."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from peftune.adapters.provenance import PROVENANCE, first_row, read_provenance, recorded_dict
from peftune.errors import UserError
from peftune.files import read_bytes
from peftune.training.metrics import events_in
from peftune.training.run_directory import is_being_written

_METRICS = "metrics.jsonl"
_QUIET = 60.0  # seconds without a line after which the lock is asked whether the run still goes on
_RECENT = 50  # steps by which the time left is estimated


@dataclass(frozen=True)
class RecordedRun:
    """A run's events and provenance (empty while it goes on); `problems` say what of them cannot be read."""

    name: str
    folder: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    age: float = math.inf
    """Seconds since the last event."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """All events of a kind."""
        return [e for e in self.events if e["event"] == event]

    @cached_property
    def start(self) -> dict[str, Any]:
        """The event that began it; empty where that is lost."""
        return next(iter(self.of("start")), {})

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe as it was resolved; empty where that is lost."""
        return recorded_dict(self.provenance, "recipe") or recorded_dict(self.start, "recipe")

    @cached_property
    def figures(self) -> dict[str, list[dict[str, Any]]]:
        """By domain those of the first evaluation and of what was delivered, or of the last evaluation."""
        found: dict[str, list[dict[str, Any]]] = {}
        for event in self.of("eval"):
            found[event["domain"]] = [found.get(event["domain"], [event])[0], event]
        for domain, rows in recorded_dict(self.provenance, "metrics").items():
            pair = [recorded_dict(rows, row) for row in (first_row(rows), "adapter")]
            if all(pair):
                found[domain] = pair
        return found

    @cached_property
    def step(self) -> int | float:
        """The last step that was taken."""
        steps = [e["step"] for e in self.events if e["event"] in ("train", "eval") and e["step"] is not None]
        return max(steps, default=0)

    @cached_property
    def total_steps(self) -> int | float | None:
        """Of the whole run; None where that is lost."""
        total = number(self.start.get("total_steps"))
        return None if math.isnan(total) else round(total)

    @cached_property
    def has_ended(self) -> bool:
        """Whether it came to its end."""
        return bool(self.provenance) or bool(self.events and self.events[-1]["event"] == "end")

    @cached_property
    def goes_on(self) -> bool:
        """Whether a process still writes it, as far as that can be seen from here."""
        if self.has_ended:
            return False
        return (bool(self.events) and self.age < _QUIET) or is_being_written(self.folder)

    def state(self) -> str:
        """How far it is, in words."""
        total = "" if self.total_steps is None else f" of {self.total_steps:,}"
        if not self.events and not self.provenance:
            return "is being loaded" if self.goes_on else "left nothing"
        if self.has_ended:
            return f"ended after step {self.step or number(self.provenance.get('step')):,g}".replace("nan", "?")
        return f"{'in progress' if self.goes_on else 'stopped'}, step {self.step:,}{total}"

    def seconds_left(self) -> float | None:
        """Estimated by the last steps; None where they do not tell."""
        recent = self.of("train")[-_RECENT:]
        tokens, rates = ([number(e.get(key)) for e in recent] for key in ("tokens", "tokens_per_second"))
        with np.errstate(all="ignore"):
            taken = np.diff(tokens) / np.array(rates[1:])
        taken = taken[np.isfinite(taken) & (taken > 0)]
        return float(taken.mean() * (self.total_steps - self.step)) if self.total_steps and len(taken) else None


def read_run(path: Path, name: str | None = None) -> RecordedRun:
    """The run in a directory, or of a file in it; UserError where there is none, and where it cannot be read."""
    folder = path.parent if path.name in (_METRICS, PROVENANCE) else path
    metrics, problems, events, age = folder / _METRICS, [], [], math.inf
    try:
        provenance = read_provenance(folder) or {}
    except UserError as error:
        provenance, problems = {}, [str(error)]
    if os.path.lexists(metrics):
        content = read_bytes(metrics, str(metrics))
        events, age = events_in(content), time.time() - metrics.stat().st_mtime
        lost = content.count(b"\n") - len(events)
        if lost > 0:
            problems.append(
                f"{metrics}: line {len(events) + 1} is damaged; it and the {lost - 1:,} after it are left out"
            )
    if not events and not provenance and not is_being_written(folder):
        expected = f"expected a directory with {_METRICS}, which a run writes to its run.out"
        raise UserError("; ".join([f"{path}: no run is there, {expected}", *problems]))
    return RecordedRun(name or folder.absolute().name, folder, events, provenance, problems, age)


def read_runs(paths: list[Path]) -> list[RecordedRun]:
    """`read_run` of each; those of one name are called by their paths."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [read_run(p, str(p)) if names.count(run.name) > 1 else run for p, run in zip(paths, runs, strict=True)]


def number(value: Any) -> float:
    """A number of a file that anybody may have written; NaN for anything else."""
    return float(value) if type(value) in (int, float) else math.nan
