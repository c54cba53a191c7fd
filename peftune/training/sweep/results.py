"""What came of a sweep: how each run ended, a row for each combination, and what can be concluded from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

from peftune.adapters.provenance import first_row
from peftune.errors import PeftuneError
from peftune.training.checkpoint import State
from peftune.training.fleet.members import Outcome
from peftune.training.health import mean_loss, validation_loss

NOISE = 0.02
"""Nats per token, 2 % of a perplexity: below it, one seed each says nothing about which of two settings is better."""
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for 95 %, two-sided, by degrees of freedom from 1; beyond the last it is at most 4 % smaller."""

Ending = Literal["delivered", "left out", "failed", "not run"]


@dataclass(frozen=True)
class RunResult:
    """How one run ended."""

    ending: Ending
    step: int | None = None
    """That was delivered, or at which it was left out."""
    loss: float | None = None
    """On the validation text at that step, nats per token."""
    seconds: float | None = None
    before: float | None = None
    """That loss at step 0, where it is known."""
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A combination over its seeds."""

    name: str
    values: dict[str, Any]
    results: dict[int, RunResult]
    """By seed."""
    ending: Ending
    """The best of its runs."""
    loss: float | None = None
    """Mean over the seeds."""
    half_width: float | None = None
    """Of the mean's interval of 95 %, by Student's t; from two seeds on."""
    against_best: float | None = None
    """Mean difference to the best row, over the seeds that both have."""
    against_half_width: float | None = None
    """Of the 95 % interval of that difference: it is paired, as a seed gives both the same order of samples."""

    @property
    def failed(self) -> dict[int, str]:
        """Why runs failed, by seed."""
        return {seed: one.reason for seed, one in self.results.items() if one.ending == "failed"}

    @property
    def steps(self) -> int | None:
        """Of the run that went furthest."""
        return max((one.step for one in self.results.values() if one.step is not None), default=None)

    @property
    def seconds(self) -> float:
        """Of all its runs."""
        return sum(one.seconds or 0.0 for one in self.results.values())

    @property
    def is_begun(self) -> bool:
        """Whether a run is still to come."""
        return any(one.ending == "not run" for one in self.results.values())

    def is_as_good(self) -> bool:
        """Whether the best may be no better: by the interval where there is one, else by `NOISE`."""
        if self.ending != "delivered" or self.against_best is None:
            return False
        return self.against_best <= (NOISE if self.against_half_width is None else self.against_half_width)


@dataclass(frozen=True)
class Edge:
    """The best value of an axis of numbers lies at its end, so a better one may lie beyond."""

    key: str
    value: float
    is_largest: bool
    beyond: float
    """The next value at the same distance."""


@dataclass(frozen=True)
class Results:
    """Rows from the best to those that did not run."""

    axes: dict[str, list[Any]]
    """The values that were compared, by key; in their order where they are numbers."""
    rows: list[Row] = field(default_factory=list)

    @property
    def best(self) -> Row | None:
        """The delivered row with the lowest loss; one of whose seeds failed only where there is no other."""
        return self.rows[0] if self.rows and self.rows[0].ending == "delivered" else None

    @property
    def before(self) -> float | None:
        """The validation loss before training."""
        known = (one.before for row in self.rows for one in row.results.values() if one.before is not None)
        return next(known, None)

    def edges(self) -> list[Edge]:
        """Axes of numbers at whose end the best value lies."""
        found = []
        for key, values in self.axes.items():
            value = self.best.values.get(key) if self.best else None
            if len(values) < 2 or not all(map(is_number, values)) or value not in (values[0], values[-1]):
                continue
            is_largest = value == values[-1]
            at, next_to = (values[-1], values[-2]) if is_largest else (values[0], values[1])
            beyond = at * at / next_to if at > 0 and next_to > 0 else 2 * at - next_to
            if at >= 0 and beyond < (1 if isinstance(at, int) else 1e-12):
                continue  # there is nothing below a rank of 1, or a warm-up of 0
            found.append(Edge(key, at, is_largest, round(beyond) if isinstance(at, int) else beyond))
        return found


def result_of(found: Outcome) -> RunResult:
    """What the outcome of a run is in the table."""
    if isinstance(found, PeftuneError):
        return RunResult("failed", reason=" ".join(str(found).split()))
    if isinstance(found, State):
        loss = validation_loss(found, found.evaluated_step)
        return RunResult("left out", found.step, loss, round(found.seconds, 1), validation_loss(found, 0))
    before, loss = (
        mean_loss({domain: of[row] for domain, of in found.metrics.items() if row in of})
        for row in (first_row(next(iter(found.metrics.values()), {})), "adapter")
    )
    return RunResult("delivered", found.step, loss, found.seconds, before)


def is_number(value: object) -> bool:
    """Whether it has a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def results_of(runs: Sequence[tuple[str, Mapping[str, Any], int, RunResult]]) -> Results:
    """Rows from runs: combination, values, seed, result."""
    rows = []
    for name, values in {name: values for name, values, *_ in runs}.items():
        results = {seed: result for combination, _, seed, result in runs if combination == name}
        endings = [one.ending for one in results.values()]
        ending: Ending = min(endings, key=_ORDER.index)
        counted = [one.loss for one in results.values() if one.ending == ending and one.loss is not None]
        mean, half = mean_and_half_width(counted)
        rows.append(Row(name, dict(values), results, ending, mean, half))
    rows.sort(key=_rank)
    axes: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.values.items():
            axes.setdefault(key, [])
            axes[key] += [value] * (value not in axes[key])
    axes = {key: sorted(values) if all(map(is_number, values)) else values for key, values in axes.items()}
    best = rows[0] if rows and rows[0].ending == "delivered" else None
    return Results(axes, [_compared(row, best) for row in rows] if best else rows)


_ORDER: list[Ending] = ["delivered", "left out", "failed", "not run"]


def _rank(row: Row) -> tuple[int, bool, float]:
    """First those of which every seed was delivered."""
    whole = all(one.ending == row.ending for one in row.results.values())
    return _ORDER.index(row.ending), not whole, math.inf if row.loss is None else row.loss


def _compared(row: Row, best: Row) -> Row:
    if row.ending != "delivered":
        return row
    losses = [{seed: one.loss for seed, one in r.results.items() if one.ending == "delivered"} for r in (row, best)]
    pairs = [(losses[0][seed], losses[1][seed]) for seed in losses[0] if seed in losses[1]]
    mean, half = mean_and_half_width([mine - its for mine, its in pairs if mine is not None and its is not None])
    return Row(row.name, row.values, row.results, row.ending, row.loss, row.half_width, mean, half)


def mean_and_half_width(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and half of its interval of 95 % by Student's t; None for what so few values do not tell."""
    if len(values) < 2:
        return (values[0], None) if values else (None, None)
    t = _T[min(len(values) - 1, len(_T)) - 1]
    return fmean(values), t * stdev(values) / math.sqrt(len(values))
