"""Many runs on one screen of a terminal: a row for each, and what they warned of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peftune.cli.output.watch import sparkline
from peftune.console import shortened
from peftune.training.metrics import validation_course
from peftune.training.report.recorded import RecordedRun, number
from peftune.training.report.sheets import figure_of

_WARNINGS = 3  # shown
_NAME = 28  # columns that a name may push others away for
_BAR, _CURVE = 4, (5, 24)  # columns
_STYLES = {"failed": "red", "stopped": "yellow", "stopped early": "cyan", "finished": "green", "loading": "dim"}
_DROPPED = ("", "tok/s", "rate", "curve")  # first to last, where names need the place


@dataclass(frozen=True)
class _Row:
    run: RecordedRun
    cells: dict[str, str]
    losses: list[float]
    style: str


def screen_of(runs: Sequence[RecordedRun], width: int, height: int) -> Group:
    """A table of at most so many lines, legible from 80 columns on; what does not fit in is counted.

    The order stays. Those that go on or have failed are left out last, then those that have warned.
    """
    told = [(run, run.warnings[-1]) for run in runs if run.warnings]
    told.sort(key=lambda pair: pair[0].phase != "failed")
    room = height - 2 - min(len(told), _WARNINGS)
    room -= len(runs) > room or len(told) > _WARNINGS
    warned = {run.folder for run, _ in told}
    urgent = sorted(runs, key=lambda run: (not run.goes_on and run.phase != "failed", run.folder not in warned))
    shown = {run.folder for run in urgent[: max(1, room)]}
    rest = [run for run in runs if run.folder not in shown]
    more = [f"{len(rest)} more runs: {_counted(rest)}"] * bool(rest)
    more += [f"warnings of {len(told) - _WARNINGS} more"] * (len(told) > _WARNINGS)
    return Group(
        _line(f"{len(runs)} runs: {_counted(runs)}", "bold"),
        _table([_row(run, run.folder in warned) for run in runs if run.folder in shown], width),
        *[_line(f"… and {'; '.join(more)}", "dim")] * bool(more),
        *(_line(f"{run.name}: {text}", _STYLES.get(run.phase, "yellow")) for run, text in told[:_WARNINGS]),
    )


def _counted(runs: Sequence[RecordedRun]) -> str:
    return ", ".join(f"{count} {phase}" for phase, count in Counter(run.phase for run in runs).items())


def _line(text: str, style: str) -> Text:
    return Text(" ".join(text.split()), style=style, no_wrap=True, overflow="ellipsis")


def _row(run: RecordedRun, has_warned: bool) -> _Row:
    last = (run.of("train") or [{}])[-1]
    losses = [loss for event in run.of("train") if math.isfinite(loss := number(event["loss"]))]
    recent = losses[-max(1, len(losses) // 10) :]
    course = list(validation_course(run.of("eval")).values())
    seconds = run.seconds_left() if run.goes_on else None
    cells = {
        "run": shortened(run.name, 1000),
        "": "",
        "step": f"{run.step:g}" + ("" if run.total_steps is None else f"/{run.total_steps:g}"),
        "loss": figure_of(sum(recent) / len(recent) if recent else math.nan, ".3f"),
        "valid.": figure_of(course[-1] if course else math.nan, ".3f"),
        "change": figure_of(course[-1] - course[0] if len(course) > 1 else math.nan, "+.3f"),
        "rate": figure_of(number(last.get("lr")), ".1e").replace("e-0", "e-"),
        "tok/s": figure_of(number(last.get("tokens_per_second")), ",.0f"),
        "eta": "" if seconds is None else _duration(seconds),
        "curve": "",
        "state": f"{run.phase.removeprefix('stopped ')}{' !' * has_warned}",
    }
    return _Row(run, cells, losses, _STYLES.get(run.phase, "yellow" if has_warned else ""))


def _table(rows: Sequence[_Row], width: int) -> Table:
    """As wide as the screen: of what columns need, names and curves take the rest."""
    columns = list(rows[0].cells)
    need = {name: max(cell_len(name), *(cell_len(row.cells[name]) for row in rows)) for name in columns}
    need |= {"": _BAR, "curve": _CURVE[0]}
    wanted = min(need["run"], _NAME)

    def rest() -> int:
        return width - sum(need[name] + 1 for name in columns if name != "run")

    for name in _DROPPED:
        if rest() < wanted:
            columns.remove(name)
    need["run"] = max(1, min(need["run"], rest()))
    if "curve" in columns:
        need["curve"] = min(_CURVE[1], _CURVE[0] + rest() - need["run"])
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True, header_style="bold")
    for name in columns:
        right = name not in ("run", "", "curve", "state")
        table.add_column(Text(name), justify="right" if right else "left", width=need[name], no_wrap=True)
    for row in rows:
        cells: dict[str, Text | ProgressBar] = {name: Text(text) for name, text in row.cells.items()}
        cells["run"] = Text(shortened(row.cells["run"], need["run"]), style="bold")
        cells["state"] = Text(row.cells["state"], style=row.style)
        cells[""] = ProgressBar(total=row.run.total_steps or 1, completed=row.run.step, width=_BAR)
        cells["curve"] = Text(sparkline(row.losses, need["curve"]))
        table.add_row(*(cells[name] for name in columns))
    return table


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}m{seconds:02}"
