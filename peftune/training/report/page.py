"""A run, or several side by side, as one HTML page that loads nothing and runs nothing.

All that runs recorded may come from anybody: the template escapes every value.
"""

from __future__ import annotations

import base64
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from peftune.adapters.provenance import recorded
from peftune.console import change
from peftune.errors import UserError, printable
from peftune.training.distributed.agreement import flatten
from peftune.training.export.plots import look_of
from peftune.training.report import sheets
from peftune.training.report.curves import draw_curves
from peftune.training.report.recorded import RecordedRun, number
from peftune.training.report.sheets import SIDE_BY_SIDE, Row, Sheet, facts, figure_of, side_by_side, text_of

_LONGEST = 20_000  # characters of any one text
_STEPS, _PROMPTS, _WARNINGS = 12, 20, 100  # shown at most


@dataclass(frozen=True)
class PagePart:
    """A part of the page: tables, or texts to copy, each with a title."""

    title: str
    sheets: list[Sheet] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)


def build_page(runs: Sequence[RecordedRun], evaluated: dict[str, Any] | None = None, refresh: int | None = None) -> str:
    """The page; `evaluated` is what `peftune eval` found, with `refresh` it is loaded anew after so many seconds.

    UserError where `evaluated` is something else.
    """
    names = [run.name for run in runs]
    domains = list(dict.fromkeys(str(name) for run in runs for name in run.figures))
    sections = [
        PagePart("Held-out text", _held_out(runs, domains) + _intervals(evaluated)),
        PagePart("Samples", _samples(runs)),
        PagePart("Recipe keys that differ", _differences(runs)),
        PagePart("Data", [*facts(runs, sheets.DATA), *sheets.notes_of(runs)]),
        PagePart("Memory", [sheets.memory_of(runs)]),
        PagePart("Environment", facts(runs, sheets.environment_of(runs))),
        PagePart("Provenance", facts(runs, sheets.PROVENANCE)),
        PagePart("How to reproduce", texts=[text for run in runs for text in _reproduction(run, len(runs))]),
    ]
    # As pictures, in which a browser loads and runs nothing; the alphabet of base64 needs no escape.
    curves = [(title, Markup(base64.b64encode(svg).decode())) for title, svg in draw_curves(runs, domains)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True)
    template = environment.from_string((files(__package__) / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=f"{names[0]} … {names[-1]}, {len(runs)} runs" if len(runs) > SIDE_BY_SIDE else ", ".join(names)[:200],
        runs=[(run, *look_of(index, len(runs))) for index, run in enumerate(runs)],
        overview=facts(runs, sheets.OVERVIEW),
        troubles=[(run.name, text) for run in runs for text in _warnings(run, -(-_WARNINGS // len(runs)))],
        curves=curves,
        sections=[s for s in sections if s.texts or any(sheet.rows for sheet in s.sheets)],
        folded=len(runs) > SIDE_BY_SIDE,
        refresh=refresh,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )


def _shown(value: Any) -> Any:
    """Of a text no half characters, no controls, and not more than fits; it is escaped after this."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    if len(value) > _LONGEST:
        value = f"{value[:_LONGEST]}… ({len(value) - _LONGEST:,} more characters)"
    return printable(value.encode("utf-8", "replace").decode())


def _warnings(run: RecordedRun, most: int) -> Row:
    """The last of them."""
    earlier = len(run.warnings) - most
    return ([f"{earlier:,} warnings before"] if earlier > 0 else []) + run.warnings[-most:]


def _held_out(runs: Sequence[RecordedRun], domains: Row) -> list[Sheet]:
    rows = []
    for domain in domains[: sheets.MOST_ROWS]:
        for run in runs:
            if pair := run.figures.get(domain):
                before, after = (number(each.get("perplexity")) for each in pair)
                changed = change(after, before) if before > 0 and math.isfinite(after) else ""
                bits = [figure_of(each.get("bits_per_byte"), ",.3f") for each in pair]
                perplexities = [figure_of(value, ",.2f") for value in (before, after)]
                rows.append([domain, run.name, figure_of(pair[1].get("tokens"), ",g"), *perplexities, changed, *bits])
    head = ["domain", "run", "tokens", "perplexity before", "with adapter", "change", "bits per byte before", "after"]
    note = "Before: at the first step. With adapter: of what was delivered, or of the last evaluation so far."
    return [Sheet("", head, rows, note, "numbers")] if rows else []


def _intervals(evaluated: dict[str, Any] | None) -> list[Sheet]:
    if evaluated is None:
        return []
    rows = []
    try:
        for domain, counted in evaluated["domains"].items():
            for model, row in evaluated["rows"].items():
                around, figures = evaluated["intervals"][model][domain], row[domain]
                against = around.get("against_base") or {}
                cells = [
                    _spread(figures["perplexity"], around["perplexity"], ",.2f"),
                    _spread(against.get("loss"), against.get("interval"), "+.4f"),
                ]
                rows.append([str(domain), str(model), figure_of(counted["documents"], ",g"), *cells])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError("the evaluation holds no figures with intervals; expected the JSON of peftune eval") from None
    note = "Against the base, below 0 is better."
    head = ["domain", "model", "documents", "perplexity", "against the base, nats per token"]
    return [Sheet("Evaluated, with 95 % intervals over documents", head, rows, note, "numbers")]


def _spread(value: Any, interval: Any, form: str) -> str:
    around = [figure_of(bound, form) for bound in interval or []]
    return figure_of(value, form) + (f" [{', '.join(around)}]" if around else "")


def _samples(runs: Sequence[RecordedRun]) -> list[Sheet]:
    """For each prompt a table: steps downwards, runs side by side; of many runs the first and the last sample."""
    texts: dict[str, dict[float, dict[str, str]]] = {}
    for run in runs:
        for event in run.of("sample"):
            step = number(event.get("step"))
            texts.setdefault(str(event.get("prompt")), {}).setdefault(step, {})[run.name] = str(event.get("text"))
    tables = []
    for prompt, by_step in list(texts.items())[:_PROMPTS]:
        steps = sorted(by_step)
        last = len(steps) - 1
        kept = [steps[round(i * last / (_STEPS - 1))] for i in range(_STEPS)] if last >= _STEPS else steps
        names = [run.name for run in runs if any(run.name in texts for texts in by_step.values())]
        head = ["step", *names]
        rows = [[f"{step:g}", *(by_step[step].get(name, "") for name in names)] for step in kept]
        if len(names) > SIDE_BY_SIDE:
            head, rows = ["run", "first step", "last step"], []
            for name in names:
                told = [f"{step:g}:{by_step[step][name]}" for step in steps if name in by_step[step]]
                rows.append([name, told[0], told[-1]])
        tables.append(Sheet(prompt, head, rows, look="samples"))
    return tables


def _differences(runs: Sequence[RecordedRun]) -> list[Sheet]:
    flat = [{key: text_of(value) for key, value in flatten(_given(run.recipe)).items()} for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    rows = [[key, *(recipe.get(key, "") for recipe in flat)] for key in keys]
    differ = [row for row in rows if len(set(row[1:])) > 1]
    return [side_by_side([run.name for run in runs], differ[: sheets.MOST_ROWS], "key")]


def _reproduction(run: RecordedRun, of_runs: int) -> list[tuple[str, str]]:
    if not run.recipe:
        return []
    of = f" of {run.name}" if of_runs > 1 else ""
    out = recorded(run.recipe, "run", "out")
    override = shlex.quote(f"run.out={out}-again")
    version = recorded(run.provenance, "peftune")
    install = f"pip install {shlex.quote(f'peftune=={version}')}\n" if version else ""
    layout = run.start.get("layout")
    started = f"# it ran as: {' '.join(str(layout).split())}\n" if layout else ""
    recipe = yaml.safe_dump(_given(run.recipe), sort_keys=False, allow_unicode=True, width=100)
    command = f"{install}{started}peftune train recipe.yaml {override}"
    if of_runs > SIDE_BY_SIDE:
        return [(run.name, f"{command}\n\n# recipe.yaml\n{recipe}")]
    return [(f"Command{of}", command), (f"recipe.yaml{of}", recipe)]


def _given(value: Any, inside: bool = False) -> Any:
    """A recipe without what its sources leave to the recipe."""
    if isinstance(value, dict):
        return {key: _given(child, inside) for key, child in value.items() if not (inside and child is None)}
    return [_given(child, True) for child in value] if isinstance(value, list) else value
