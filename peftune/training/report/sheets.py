"""The tables of the page: what runs recorded, as texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftune.adapters.provenance import recorded, recorded_dict, recorded_list
from peftune.console import change, name_some
from peftune.training.report.recorded import RecordedRun, number

MOST_ROWS = 500
SIDE_BY_SIDE = 6  # runs
_RANKS = 64

Row = list[str]


@dataclass(frozen=True)
class Sheet:
    """A table of the page; `look` has the classes of its cells."""

    title: str
    head: Row
    rows: list[Row]
    note: str = ""
    look: str = ""


Facts = Sequence[tuple[str, Callable[[RecordedRun], str]]]


def facts(runs: Sequence[RecordedRun], asked: Facts) -> list[Sheet]:
    """`side_by_side`, without what no run tells; of many runs what is true of all is told once."""
    rows = [row for row in ([label, *map(of, runs)] for label, of in asked) if any(row[1:])]
    same = [row for row in rows if len(runs) > SIDE_BY_SIDE and len(set(row[1:])) == 1]
    differ = [row for row in rows if row not in same]
    return [Sheet("", ["", "all runs"], [row[:2] for row in same]), side_by_side([run.name for run in runs], differ)]


def side_by_side(names: Row, rows: list[Row], corner: str = "") -> Sheet:
    """Rows of what each run has of something, under its name; many runs stand below each other instead."""
    table = [[corner, *names], *rows]
    if len(names) > SIDE_BY_SIDE and rows:
        table = [[*cells] for cells in zip(*table, strict=True)]
        table[0][0] = "run"
    return Sheet("", table[0], table[1:])


def _of_start(key: str, form: str = "") -> Callable[[RecordedRun], str]:
    """What the first event says, else peftune.json."""
    return lambda run: text_of(run.start.get(key, run.provenance.get(key)), form)


def _of_provenance(*keys: str) -> Callable[[RecordedRun], str]:
    return lambda run: text_of(recorded(run.provenance, *keys))


def _of_recipe(*keys: str) -> Callable[[RecordedRun], str]:
    return lambda run: text_of(recorded(run.recipe, *keys))


def _time_taken(run: RecordedRun) -> str:
    seconds = number((run.of("end") or [run.provenance])[-1].get("seconds"))
    return "" if math.isnan(seconds) else f"{seconds:,.0f} s"


OVERVIEW: Facts = [
    ("state", RecordedRun.state),
    ("base", _of_recipe("base")),
    ("adapter", lambda run: " ".join(text_of(recorded(run.recipe, "lora", key)) for key in ("variant", "targets"))),
    ("rank", _of_recipe("lora", "rank")),
    ("trained parameters", _of_start("trainable_parameters", ",")),
    ("tokens trained on", lambda run: text_of(next((e.get("tokens") for e in run.of("train")[::-1]), None), ",")),
    ("time", _time_taken),
]
DATA: Facts = [
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
PROVENANCE: Facts = [
    ("fingerprint of the base", _of_provenance("base_fingerprint")),
    ("fingerprints of the data", _of_provenance("data_fingerprints")),
    ("went on from", lambda run: _chain(run, "init")),
    ("merged into the base", lambda run: _chain(run, "base_merged")),
    ("delivered step", _of_provenance("step")),
    ("resumed", lambda run: ", ".join(f"from step {event.get('from_step')}" for event in run.of("resume")[:MOST_ROWS])),
]


def environment_of(runs: Sequence[RecordedRun]) -> Facts:
    """What computed, and in which versions."""
    names = dict.fromkeys(str(name) for run in runs for name in recorded_dict(run.provenance, "versions"))
    return [
        ("precision", _of_start("precision")),
        ("processes", _of_start("layout")),
        ("blocks a forward", _of_start("micro_size")),
        ("computed by", _of_start("function")),
        ("peftune", _of_provenance("peftune")),
        *((name, _of_provenance("versions", name)) for name in names),
    ]


def _paths(sources: Any) -> str:
    """Sources by their paths alone."""
    if isinstance(sources, dict):
        return "; ".join(f"{name}: {_paths(source)}" for name, source in sources.items())
    return ", ".join(text_of(recorded(s, "path")) for s in sources) if isinstance(sources, list) else text_of(sources)


def _chain(run: RecordedRun, key: str) -> str:
    """Adapters, the nearest first."""
    return ", before that ".join(
        f"{each.get('adapter') or 'an adapter'} ({str(each.get('adapter_fingerprint'))[:12]}, base {each.get('base')})"
        for each in recorded_list(run.provenance, key)
    )


def notes_of(runs: Sequence[RecordedRun]) -> list[Sheet]:
    """What was found in the text when runs began."""
    told: dict[str, list[str]] = {}
    for run in runs:
        notes = run.start.get("notes")
        for note in notes if isinstance(notes, list) else []:
            told.setdefault(str(note), []).append(run.name)
    rows = [[name_some(names, SIDE_BY_SIDE), note] for note, names in told.items()]
    return [Sheet("Findings", ["run", "what was found when the run began"], rows[:MOST_ROWS])] if rows else []


def memory_of(runs: Sequence[RecordedRun]) -> Sheet:
    """The peak, measured and predicted, and what each rank held."""
    rows: list[Row] = []
    for run in runs:
        for event in run.of("peak_memory")[-1:]:
            measured, predicted = (number(event.get(f"{key}_bytes")) for key in ("measured", "predicted"))
            off = change(predicted, measured) if measured > 0 and math.isfinite(predicted) else ""
            rows += [[run.name, "peak, measured", _megabytes(measured), ""]]
            rows += [[run.name, "peak, predicted", _megabytes(predicted), off]]
        for rank, parts in enumerate(_of_ranks(run) if len(runs) <= SIDE_BY_SIDE else []):
            rows += [[run.name, f"rank {rank}: {name}", _megabytes(number(size)), ""] for name, size in parts.items()]
    return Sheet("", ["run", "what", "MB", "against measured"], rows[:MOST_ROWS], look="numbers")


def _of_ranks(run: RecordedRun) -> list[dict[str, Any]]:
    return [part for event in run.of("memory")[-1:] for part in recorded_list(event, "bytes_per_rank")][:_RANKS]


def text_of(value: Any, form: str = "") -> str:
    """Any value of a JSON file, for people; a number in this format."""
    if value is None or isinstance(value, str):
        return value or ""
    if type(value) in (int, float):
        return f"{value:{form}}"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {text_of(child)}" for name, child in value.items())
    return json.dumps(value, ensure_ascii=False)


def figure_of(value: Any, form: str) -> str:
    """A number in this format; empty for anything else."""
    known = number(value)
    return "" if math.isnan(known) else f"{known:{form}}"


def _megabytes(size: float) -> str:
    return figure_of(size / 1e6, ",.1f")
