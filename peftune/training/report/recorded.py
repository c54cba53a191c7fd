"""What a run has left on the disk so far, finished or not, whole or damaged."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
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
_DIGITS = re.compile(r"(\d+)")
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
    lines: bytes = field(default=b"", repr=False)
    """Of the metrics what was read so far, as whole lines, each an event."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """All events of a kind."""
        return self._by_kind.get(event, [])

    @cached_property
    def _by_kind(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for event in self.events:
            found.setdefault(event["event"], []).append(event)
        return found

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
    def warnings(self) -> list[str]:
        """What of it cannot be read, what it warned of and why it failed, each on one line."""
        told = [f"warning at step {event.get('step')}: {event.get('text')}" for event in self.of("warning")]
        if self.has_failed:
            told.append(f"failed at step {self.events[-1].get('step')}: {self.events[-1].get('text')}")
        return [" ".join(text.split()) for text in [*self.problems, *told]]

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
    def has_failed(self) -> bool:
        """Whether it ended with an error, which the last event tells."""
        return bool(self.events) and self.events[-1]["event"] == "failed"

    @cached_property
    def goes_on(self) -> bool:
        """Whether a process still writes it, as far as that can be seen from here."""
        if self.has_ended or self.has_failed:
            return False
        return (bool(self.events) and self.age < _QUIET) or is_being_written(self.folder)

    @cached_property
    def phase(self) -> str:
        """What it does, in a word or two."""
        if self.has_ended:
            return "stopped early" if self.total_steps and self.step < self.total_steps else "finished"
        if self.goes_on:
            return "running" if self.events else "loading"
        return "failed" if self.has_failed else "stopped"

    def state(self) -> str:
        """How far it is, in words."""
        total = "" if self.total_steps is None else f" of {self.total_steps:,}"
        if not self.events and not self.provenance:
            return "is being loaded" if self.goes_on else "left nothing"
        if self.has_ended:
            return f"ended after step {self.step or number(self.provenance.get('step')):,g}".replace("nan", "?")
        phase = "in progress" if self.goes_on else self.phase
        return f"{phase}, step {self.step:,}{total}"

    def seconds_left(self) -> float | None:
        """Estimated by the last steps; None where they do not tell."""
        recent = self.of("train")[-_RECENT:]
        tokens, rates = ([number(e.get(key)) for e in recent] for key in ("tokens", "tokens_per_second"))
        with np.errstate(all="ignore"):
            taken = np.diff(tokens) / np.array(rates[1:])
        taken = taken[np.isfinite(taken) & (taken > 0)]
        return float(taken.mean() * (self.total_steps - self.step)) if self.total_steps and len(taken) else None


class RunReader:
    """Reads runs again and again, of each what was appended since it was read before."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.known = paths, dict[Path, RecordedRun]()

    def read(self) -> list[RecordedRun]:
        """Runs in the order of their paths; those of one name are called by their paths.

        A directory that is no run stands for the runs in it, by name. UserError where one that is asked for cannot be
        read at first; later, and of those in a directory, it becomes a problem of that run.
        """
        folders = list(dict.fromkeys(folder for path in self.paths for folder in _runs_at(path)))
        names = [folder.absolute().name for folder in folders]
        found = {}
        for folder, name in zip(folders, names, strict=True):
            called = name if names.count(name) == 1 else str(folder)
            try:
                found[folder] = read_run(folder, called, self.known.get(folder))
            except UserError as error:
                if folder not in self.known and folder in map(_folder_of, self.paths):
                    raise
                found[folder] = RecordedRun(called, folder, problems=[str(error)])
        self.known = found
        return [*found.values()]


def read_run(path: Path, name: str | None = None, before: RecordedRun | None = None) -> RecordedRun:
    """The run in a directory, or of a file in it; UserError where there is none, and where it cannot be read.

    Events that were read `before`, and are still there, are not read again.
    """
    folder = _folder_of(path)
    metrics, problems, events, age, lines = folder / _METRICS, list[str](), list[dict[str, Any]](), math.inf, b""
    if exists := os.path.lexists(metrics):
        content = read_bytes(metrics, str(metrics))
        age = time.time() - metrics.stat().st_mtime
        if before is None or not content.startswith(before.lines):
            before = None
        else:
            lines, events = before.lines, before.events[: before.lines.count(b"\n")]
        events = events + events_in(content[len(lines) :])
        lost = content.count(b"\n") - len(events)
        if lost > 0:
            problems.append(
                f"{metrics}: line {len(events) + 1} is damaged; it and the {lost - 1:,} after it are left out"
            )
        else:
            lines = content[: content.rfind(b"\n") + 1]
    try:
        known = before.provenance if before and exists else {}
        provenance = known or read_provenance(folder) or {}
    except UserError as error:
        provenance, problems = {}, [str(error), *problems]
    if not events and not provenance and not is_being_written(folder):
        expected = f"expected a directory with {_METRICS}, which a run writes to its run.out, or one that holds such"
        raise UserError("; ".join([f"{path}: no run is there, {expected} directories", *problems]))
    return RecordedRun(name or folder.absolute().name, folder, events, provenance, problems, age, lines)


def _folder_of(path: Path) -> Path:
    return path.parent if path.name in (_METRICS, PROVENANCE) else path


def _runs_at(path: Path) -> list[Path]:
    """The directory of a run, or else of all runs one level below, numbers in their names in order."""
    folder, below = _folder_of(path), list[Path]()
    if not any(os.path.lexists(folder / name) for name in (_METRICS, PROVENANCE)):
        with suppress(OSError):
            below = [each for each in folder.iterdir() if os.path.isfile(each / _METRICS) or is_being_written(each)]
    return sorted(below, key=lambda each: [int(t) if t.isdecimal() else t for t in _DIGITS.split(each.name)]) or [
        folder
    ]


def number(value: Any) -> float:
    """A number of a file that anybody may have written; NaN for anything else."""
    return float(value) if type(value) in (int, float) else math.nan
