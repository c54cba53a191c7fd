"""A run in progress, in the terminal: how far it is, its curves in a line of characters, what it warned of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peftune.training.report.recorded import RecordedRun, number

_HEIGHTS = "▁▂▃▄▅▆▇█"
_WIDTH = 48  # characters of a curve
_DOMAINS, _WARNINGS = 12, 3  # shown


def view_of(run: RecordedRun) -> Group:
    """All of it, for a terminal."""
    parts: list[Text | ProgressBar | Table] = [Text(f"{run.name}: {run.state()}{_left(run)}", style="bold")]
    if run.total_steps:
        parts.append(ProgressBar(total=run.total_steps, completed=run.step, width=60))
    table = Table(box=None, pad_edge=False, show_header=False)
    losses = [number(event["loss"]) for event in run.of("train")]
    table.add_row("loss", Text(_last(losses, ".4f"), style="bold"), sparkline(losses))
    for domain, values in list(_validation(run).items())[:_DOMAINS]:
        table.add_row(Text(f"validation: {domain}"), Text(_last(values, ".4f"), style="bold"), sparkline(values))
    for label, key, form in (("rate", "lr", ".2e"), ("gradient norm", "grad_norm", ".3f")):
        values = [number(event.get(key)) for event in run.of("train")]
        table.add_row(label, _last(values, form), sparkline(values))
    speeds = [number(event.get("tokens_per_second")) for event in run.of("train")[-_WIDTH:]]
    table.add_row("tokens/s", _last(speeds, ",.0f"), sparkline(speeds))
    parts.append(table)
    return Group(*parts, *(Text(text, style="yellow") for text in run.warnings[-_WARNINGS:]))


class LineWatcher:
    """Where there is no terminal: a line for each look that found something new, and for each warning."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.said, self.warned = say, "", 0

    def show(self, run: RecordedRun, several: bool = False) -> None:
        """Say what is new in the run since the look before; of one of several with its name."""
        warnings = run.warnings
        for text in warnings[self.warned :]:
            self.say(f"{run.name}: {text}" if several else text)
        self.warned = len(warnings)
        losses = [number(event["loss"]) for event in run.of("train")]
        domains = [f"validation {domain} {_last(values, '.4f')}" for domain, values in _validation(run).items()]
        rate = _last([number(event.get("lr")) for event in run.of("train")], ".2e")
        figures = [f"loss {_last(losses, '.4f')}"] * bool(losses) + domains + [f"lr {rate}"] * bool(rate)
        known = ", ".join([f"{run.name}: {run.state()}", *figures])
        if known != self.said:
            self.say(f"{known}{_left(run)}")
        self.said = known


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """The course of a value, the lowest at the bottom; each character is the mean of a stretch."""
    known = [value for value in values if math.isfinite(value)]
    count = min(width, len(known))
    bounds = [len(known) * i // count for i in range(count + 1)] if count else []
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_HEIGHTS) - 1) / (high - low) if high > low else 0.0
    return "".join(_HEIGHTS[round((mean - low) * scale)] for mean in means)


def _validation(run: RecordedRun) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for event in run.of("eval"):
        found.setdefault(event["domain"], []).append(number(event["loss"]))
    return found


def _last(values: Sequence[float], form: str) -> str:
    return f"{values[-1]:{form}}" if values else ""


def _left(run: RecordedRun) -> str:
    seconds = run.seconds_left() if run.goes_on else None
    return "" if seconds is None else f", about {timedelta(seconds=round(seconds))} left for the steps"
