"""What `peftune sweep` prints at its end: a row for each combination, and what can be concluded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from peftune.cli.output.text_output import echo, print_table
from peftune.console import counted, name_some
from peftune.training.sweep.grid import value_text
from peftune.training.sweep.results import Results, Row
from peftune.training.sweep.written import BEST, PICTURE, TABLE, perplexity_of

_LONGEST = 300  # characters of a reason


def print_sweep(found: Results, out: Path) -> None:
    """The table, why runs failed, what it tells and does not tell, and where the best lies."""
    several = max((len(row.results) for row in found.rows), default=1) > 1
    columns = [*found.axes, "loss", *(["± over seeds"] if several else []), "perplexity", "against the best"]
    columns += ["steps", "seconds", "state"]
    before = "" if found.before is None else f"; before training {found.before:.4f}"
    title = f"{counted(len(found.rows), 'combination')} in {out}, by validation loss in nats per token{before}"
    print_table(title, columns, (_cells(row, found, several) for row in found.rows), left=len(found.axes))
    for row in found.rows:
        for seed, reason in row.failed.items():
            which = f" (seed {seed})" if len(row.results) > 1 else ""
            echo(f"failed: {row.name}{which}: {reason[:_LONGEST]}")
    for line in conclusions(found, several):
        echo(line)
    if found.best is not None:
        best = shlex.quote(str(out / found.best.name))
        echo(f"best: {found.best.name}; its adapter: peftune generate --adapter {best}")
        echo(f"its recipe, for a longer run or more data: peftune train {shlex.quote(str(out / BEST))}")
        echo(f"{out}/{PICTURE} shows the losses, {out}/{TABLE} has every run")


def _cells(row: Row, found: Results, several: bool) -> list[str | Text]:
    loss = "-" if row.loss is None else f"{row.loss:.4f}"
    perplexity = "-" if row.loss is None else f"{perplexity_of(row.loss):,.2f}"
    against = "-"
    if row is found.best:
        against = "best"
    elif row.against_best is not None:
        half = row.against_half_width
        against = f"{row.against_best:+.4f}" + ("" if half is None else f" ± {half:.4f}")
    width = ["-" if row.half_width is None else f"{row.half_width:.4f}"] if several else []
    steps = "-" if row.steps is None else f"{row.steps:,}"
    state: str = row.ending
    if several and state == "delivered":
        state = f"{sum(one.ending == state for one in row.results.values())} of {len(row.results)} seeds"
    values = [value_text(row.values[key]) if key in row.values else "-" for key in found.axes]
    cells = [*values, loss, *width, perplexity, against, steps, f"{row.seconds:,.0f}", state]
    style = "bold green" if row is found.best else "dim" if row.ending != "delivered" else ""
    return [Text(" ".join(cell.split("\n")), style) for cell in cells]


def conclusions(found: Results, several: bool) -> Iterator[str]:
    """What the figures can and cannot tell, a line each."""
    best = found.best
    if best is None:
        yield "nothing was delivered, so nothing can be compared"
        return
    near = [row for row in found.rows[1:] if row.is_as_good()]
    if not several:
        yield (
            "One seed each: differences below about 0.01 to 0.02 nats (1 to 2 % of perplexity) are within what another "
            f"seed alone would do{_others(near, 'lies', 'lie', 'that near to the best')}; --seeds 3 tells more."
        )
    else:
        yield (
            "Intervals are of 95 % over seeds (Student's t). What decides is the difference to the best, taken seed by "
            f"seed: it surely is worse where the interval lies above 0{_others(near, 'may be', 'may be', 'as good')}."
        )
        if (fewest := min(len(row.results) for row in found.rows)) < 3:
            yield f"With {counted(fewest, 'seed')} an interval is very wide or missing; three or more are worth it."
    for edge in found.edges():
        side, bound = ("largest", "above") if edge.is_largest else ("smallest", "below")
        yield (
            f"{edge.key}={value_text(edge.value)} is the {side} that was tried: a better one may lie {bound}; add "
            f"{edge.key}={value_text(edge.beyond)}."
        )
    if left := [row for row in found.rows if row.ending == "left out"]:
        yield (
            f"{counted(len(left), 'combination')} left out after a part of the steps: one that learns slowly at first "
            "(a small rate, a long warm-up) may have won at the end; without --halving all are trained."
        )


def _others(near: list[Row], is_one: str, are_many: str, what: str) -> str:
    if not near:
        return ""
    verb = is_one if len(near) == 1 else are_many
    return f"; {name_some([row.name for row in near], 3)} {verb} {what}"
