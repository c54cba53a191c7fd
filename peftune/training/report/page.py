"""A run, or several side by side, as one HTML page that loads nothing and runs nothing.

All that runs recorded may come from anybody: the template escapes every value.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from peftune.adapters.provenance import first_row, recorded, recorded_dict, recorded_list
from peftune.console import change
from peftune.errors import UserError, printable
from peftune.training.distributed.agreement import flatten
from peftune.training.report.curves import draw_curves, look_of
from peftune.training.report.recorded import RecordedRun, number

_LONGEST = 20_000  # characters of any one text
_STEPS, _PROMPTS, _WARNINGS, _RANKS, _ROWS = 12, 20, 100, 64, 500  # shown at most

Row = list[str]


@dataclass(frozen=True)
class Sheet:
    """A table of the page; `look` has the classes of its cells."""

    title: str
    head: Row
    rows: list[Row]
    note: str = ""
    look: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: tables, or texts to copy, each with a title."""

    title: str
    sheets: list[Sheet] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)


def build_page(runs: Sequence[RecordedRun], evaluated: dict[str, Any] | None = None, refresh: int | None = None) -> str:
    """The page; `evaluated` is what `peftune eval` found, with `refresh` it is loaded anew after so many seconds.

    UserError where `evaluated` is something else.
    """
    domains = list(dict.fromkeys(str(name) for run in runs for name in _figures(run)))
    sections = [
        Section("Held-out text", _held_out(runs, domains) + _intervals(evaluated)),
        Section("Samples", _samples(runs)),
        Section("Recipe keys that differ", _differences(runs)),
        Section("Data", [_facts(runs, _DATA), *_notes(runs)]),
        Section("Memory", [_memory(runs)]),
        Section("Environment", [_facts(runs, _ENVIRONMENT)]),
        Section("Provenance", [_facts(runs, _PROVENANCE)]),
        Section("How to reproduce", texts=[text for run in runs for text in _reproduction(run, len(runs) > 1)]),
    ]
    # As pictures, in which a browser loads and runs nothing; the alphabet of base64 needs no escape.
    curves = [(title, Markup(base64.b64encode(svg).decode())) for title, svg in draw_curves(runs, domains)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True)
    template = environment.from_string((files(__package__) / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=", ".join(run.name for run in runs)[:200],
        runs=[(run, *look_of(index)) for index, run in enumerate(runs)],
        overview=_facts(runs, _OVERVIEW),
        troubles=[(run.name, text) for run in runs for text in [*run.problems, *_warnings(run)]],
        curves=curves,
        sections=[s for s in sections if s.texts or any(sheet.rows for sheet in s.sheets)],
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


def _warnings(run: RecordedRun) -> Row:
    told = [f"step {event.get('step')}: {event.get('text')}" for event in run.of("warning")]
    more = len(told) - _WARNINGS
    return told[:_WARNINGS] + ([f"{more:,} more warnings"] if more > 0 else [])


def _figures(run: RecordedRun) -> dict[str, list[dict[str, Any]]]:
    """By domain the figures of the first evaluation and of what was delivered, or of the last evaluation."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in run.of("eval"):
        found[event["domain"]] = [found.get(event["domain"], [event])[0], event]
    for domain, rows in recorded_dict(run.provenance, "metrics").items():
        pair = [recorded_dict(rows, row) for row in (first_row(rows), "adapter")]
        if all(pair):
            found[domain] = pair
    return found


def _held_out(runs: Sequence[RecordedRun], domains: Row) -> list[Sheet]:
    rows = []
    for domain in domains[:_ROWS]:
        for run in runs:
            if pair := _figures(run).get(domain):
                before, after = (number(each.get("perplexity")) for each in pair)
                changed = change(after, before) if before > 0 and math.isfinite(after) else ""
                bits = [_number(each.get("bits_per_byte"), ",.3f") for each in pair]
                perplexities = [_number(value, ",.2f") for value in (before, after)]
                rows.append([domain, run.name, _number(pair[1].get("tokens"), ",g"), *perplexities, changed, *bits])
    head = ["domain", "run", "tokens", "perplexity before", "with adapter", "change", "bits per byte before", "after"]
    note = "Before: at the first step. With adapter: of what was delivered, or of the last evaluation so far."
    return [Sheet("", head, rows, note, "numbers")] if rows else []


def _intervals(evaluated: dict[str, Any] | None) -> list[Sheet]:
    if evaluated is None:
        return []
    rows = []
    try:
        for domain, facts in evaluated["domains"].items():
            for model, row in evaluated["rows"].items():
                around, figures = evaluated["intervals"][model][domain], row[domain]
                against = around.get("against_base") or {}
                cells = [
                    _spread(figures["perplexity"], around["perplexity"], ",.2f"),
                    _spread(against.get("loss"), against.get("interval"), "+.4f"),
                ]
                rows.append([str(domain), str(model), _number(facts["documents"], ",g"), *cells])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError("the evaluation holds no figures with intervals; expected the JSON of peftune eval") from None
    note = "Against the base, below 0 is better."
    head = ["domain", "model", "documents", "perplexity", "against the base, nats per token"]
    return [Sheet("Evaluated, with 95 % intervals over documents", head, rows, note, "numbers")]


def _spread(value: Any, interval: Any, form: str) -> str:
    around = [_number(bound, form) for bound in interval or []]
    return _number(value, form) + (f" [{', '.join(around)}]" if around else "")


def _samples(runs: Sequence[RecordedRun]) -> list[Sheet]:
    """For each prompt a table: steps downwards, runs side by side."""
    texts: dict[str, dict[float, dict[str, str]]] = {}
    for run in runs:
        for event in run.of("sample"):
            step = number(event.get("step"))
            texts.setdefault(str(event.get("prompt")), {}).setdefault(step, {})[run.name] = str(event.get("text"))
    sheets = []
    for prompt, by_step in list(texts.items())[:_PROMPTS]:
        steps = sorted(by_step)
        last = len(steps) - 1
        kept = [steps[round(i * last / (_STEPS - 1))] for i in range(_STEPS)] if last >= _STEPS else steps
        names = [run.name for run in runs if any(run.name in texts for texts in by_step.values())]
        rows = [[f"{step:g}", *(by_step[step].get(name, "") for name in names)] for step in kept]
        sheets.append(Sheet(prompt, ["step", *names], rows, look="samples"))
    return sheets


def _differences(runs: Sequence[RecordedRun]) -> list[Sheet]:
    flat = [{key: _text(value) for key, value in flatten(_given(run.recipe)).items()} for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    rows = [[key, *(recipe.get(key, "") for recipe in flat)] for key in keys]
    return [Sheet("", ["key", *(run.name for run in runs)], [row for row in rows if len(set(row[1:])) > 1][:_ROWS])]


Facts = Sequence[tuple[str, Callable[[RecordedRun], str]]]


def _facts(runs: Sequence[RecordedRun], facts: Facts) -> Sheet:
    rows = [[label, *map(of, runs)] for label, of in facts]
    return Sheet("", ["", *(run.name for run in runs)], [row for row in rows if any(row[1:])])


def _of_start(key: str, form: str = "") -> Callable[[RecordedRun], str]:
    """What the first event says, else peftune.json."""
    return lambda run: _text(run.start.get(key, run.provenance.get(key)), form)


def _of_provenance(*keys: str) -> Callable[[RecordedRun], str]:
    return lambda run: _text(recorded(run.provenance, *keys))


def _of_recipe(*keys: str) -> Callable[[RecordedRun], str]:
    return lambda run: _text(recorded(run.recipe, *keys))


def _time_taken(run: RecordedRun) -> str:
    seconds = number((run.of("end") or [run.provenance])[-1].get("seconds"))
    return "" if math.isnan(seconds) else f"{seconds:,.0f} s"


_OVERVIEW: Facts = [
    ("state", RecordedRun.state),
    ("base", _of_recipe("base")),
    ("adapter", lambda run: " ".join(_text(recorded(run.recipe, "lora", key)) for key in ("variant", "targets"))),
    ("rank", _of_recipe("lora", "rank")),
    ("trained parameters", _of_start("trainable_parameters", ",")),
    ("tokens trained on", lambda run: _text(next((e.get("tokens") for e in run.of("train")[::-1]), None), ",")),
    ("time", _time_taken),
]
_DATA: Facts = [
    ("training text", lambda run: _paths(recorded(run.recipe, "data", "train"))),
    ("validation text", lambda run: _paths(recorded(run.recipe, "data", "validation"))),
    ("summary", _of_start("data")),
    ("blocks", _of_start("blocks", ",")),
    ("tokens a block", _of_start("block_size", ",")),
    ("share of blocks filled", _of_start("packing_fill")),
    ("tokens an epoch", _of_start("tokens_per_epoch", ",")),
    ("rows left out", _of_provenance("rows_left_out")),
    ("validation documents trained on too", _of_provenance("validation_also_trained_on")),
]
_ENVIRONMENT: Facts = [
    ("precision", _of_start("precision")),
    ("processes", _of_start("layout")),
    ("blocks a forward", _of_start("micro_size")),
    ("computed by", _of_start("function")),
    ("peftune", _of_provenance("peftune")),
    *((name, _of_provenance("versions", name)) for name in (
        "python", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "bitsandbytes")),
]  # fmt: skip
_PROVENANCE: Facts = [
    ("fingerprint of the base", _of_provenance("base_fingerprint")),
    ("fingerprints of the data", _of_provenance("data_fingerprints")),
    ("went on from", lambda run: _chain(run, "init")),
    ("merged into the base", lambda run: _chain(run, "base_merged")),
    ("delivered step", _of_provenance("step")),
    ("resumed", lambda run: ", ".join(f"from step {event.get('from_step')}" for event in run.of("resume")[:_ROWS])),
]


def _paths(sources: Any) -> str:
    """Sources by their paths alone."""
    if isinstance(sources, dict):
        return "; ".join(f"{name}: {_paths(source)}" for name, source in sources.items())
    return ", ".join(_text(recorded(s, "path")) for s in sources) if isinstance(sources, list) else _text(sources)


def _chain(run: RecordedRun, key: str) -> str:
    """Adapters, the nearest first."""
    return ", before that ".join(
        f"{each.get('adapter') or 'an adapter'} ({str(each.get('adapter_fingerprint'))[:12]}, base {each.get('base')})"
        for each in recorded_list(run.provenance, key)
    )


def _notes(runs: Sequence[RecordedRun]) -> list[Sheet]:
    told = [(run.name, run.start.get("notes")) for run in runs]
    rows = [[name, str(note)] for name, notes in told if isinstance(notes, list) for note in notes]
    return [Sheet("Findings", ["run", "what was found when the run began"], rows[:_ROWS])] if rows else []


def _memory(runs: Sequence[RecordedRun]) -> Sheet:
    rows: list[Row] = []
    for run in runs:
        for event in run.of("peak_memory")[-1:]:
            measured, predicted = (number(event.get(f"{key}_bytes")) for key in ("measured", "predicted"))
            off = change(predicted, measured) if measured > 0 and math.isfinite(predicted) else ""
            rows += [[run.name, "peak, measured", _megabytes(measured), ""]]
            rows += [[run.name, "peak, predicted", _megabytes(predicted), off]]
        for rank, parts in enumerate(_of_ranks(run)):
            rows += [[run.name, f"rank {rank}: {name}", _megabytes(number(size)), ""] for name, size in parts.items()]
    return Sheet("", ["run", "what", "MB", "against measured"], rows[:_ROWS], look="numbers")


def _of_ranks(run: RecordedRun) -> list[dict[str, Any]]:
    return [part for event in run.of("memory")[-1:] for part in recorded_list(event, "bytes_per_rank")][:_RANKS]


def _reproduction(run: RecordedRun, several: bool) -> list[tuple[str, str]]:
    if not run.recipe:
        return []
    of = f" of {run.name}" if several else ""
    out = recorded(run.recipe, "run", "out")
    override = shlex.quote(f"run.out={out}-again")
    version = recorded(run.provenance, "peftune")
    install = f"pip install {shlex.quote(f'peftune=={version}')}\n" if version else ""
    layout = run.start.get("layout")
    started = f"# it ran as: {' '.join(str(layout).split())}\n" if layout else ""
    recipe = yaml.safe_dump(_given(run.recipe), sort_keys=False, allow_unicode=True, width=100)
    return [(f"Command{of}", f"{install}{started}peftune train recipe.yaml {override}"), (f"recipe.yaml{of}", recipe)]


def _given(value: Any, inside: bool = False) -> Any:
    """A recipe without what its sources leave to the recipe."""
    if isinstance(value, dict):
        return {key: _given(child, inside) for key, child in value.items() if not (inside and child is None)}
    return [_given(child, True) for child in value] if isinstance(value, list) else value


def _text(value: Any, form: str = "") -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if type(value) in (int, float):
        return f"{value:{form}}"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_text(child)}" for name, child in value.items())
    return json.dumps(value, ensure_ascii=False)


def _number(value: Any, form: str) -> str:
    known = number(value)
    return "" if math.isnan(known) else f"{known:{form}}"


def _megabytes(size: float) -> str:
    return _number(size / 1e6, ",.1f")
