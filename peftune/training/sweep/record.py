"""`sweep.json`: what a sweep's directory holds, so that the same command goes on and another grid can be added."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from peftune.console import name_some
from peftune.errors import UserError, explained
from peftune.files import read_object_if_present, remove_leftovers, sha256_of_values, write_json
from peftune.training.distributed.agreement import where_they_differ
from peftune.training.run_directory import check_writable
from peftune.training.sweep.grid import PlannedRun
from peftune.training.sweep.results import Results, RunResult, results_of

RECORD = "sweep.json"
_LOCK, _DIGEST = ".lock", "sha256"


@dataclass
class SweptRun:
    """A run of the sweep, as it is recorded."""

    combination: str
    seed: int
    values: dict[str, Any]
    recipe: dict[str, Any]
    """What decides what it learns: the recipe's values, and the fingerprints of what it reads."""
    result: RunResult = field(default_factory=lambda: RunResult("not run"))


@dataclass
class Rung:
    """A decision of successive halving."""

    share: float
    losses: dict[str, list[float | None]]
    """Of those that were compared, by seed; null where a run failed."""
    kept: list[str]


@dataclass
class Record:
    """All runs of a directory, by name, and the decisions that were taken."""

    runs: dict[str, SweptRun] = field(default_factory=dict)
    rungs: list[Rung] = field(default_factory=list)

    def add(self, members: Sequence[PlannedRun], recipes: Sequence[dict[str, Any]], where: Path) -> None:
        """Take in these members; UserError where one is recorded with another recipe, or they cannot be compared."""
        free = {"run.seed", *(key for run in self.runs.values() for key in run.values)}
        free |= {key for member in members for key in member.values}
        first, problems = next(iter(self.runs.values()), None), dict[str, None]()
        new = dict[str, SweptRun]()
        for member, recipe in zip(members, recipes, strict=True):
            run = SweptRun(member.combination, member.recipe.run.seed, _as_read(member.values), _as_read(recipe))
            known = self.runs.get(member.name)
            if known is not None:
                problems |= {f"{member.name}: {each}": None for each in _differences(known.recipe, run.recipe, set())}
            else:
                new[member.name] = run
                if first is not None:  # rows of a table differ in axes and seeds alone
                    problems |= dict.fromkeys(_differences(first.recipe, run.recipe, free))
        if problems:
            raise UserError(
                f"{where} holds a sweep of another recipe: {'; '.join(list(problems)[:4])}. Choose another directory "
                "for this one; to go on with that one, undo the change"
            )
        self.runs |= new

    def decision(self, share: float, names: Sequence[str]) -> list[str] | None:
        """Which of these combinations were kept at this share of the steps, where that was decided before."""
        same = [rung.kept for rung in self.rungs if rung.share == share and rung.losses.keys() == set(names)]
        return next((kept for kept in same if kept and set(kept) <= set(names)), None)

    def results(self) -> Results:
        """The table; each row with a value for every axis of any grid."""
        axes = dict.fromkeys(key for run in self.runs.values() for key in run.values)
        return results_of([
            (run.combination, {key: known[key] for key in axes if key in known}, run.seed, run.result)
            for run in self.runs.values() for known in [run.recipe | run.values]
        ])  # fmt: skip

    def write(self, out: Path) -> None:
        """Write it, with a line for each combination that needs no second look at the runs."""
        rows = [
            {
                "combination": row.name, "values": row.values, "state": row.ending, "loss": row.loss,
                "half_width": row.half_width, "against_best": row.against_best,
                "against_best_half_width": row.against_half_width, "steps": row.steps, "seconds": row.seconds,
            }
            for row in self.results().rows
        ]  # fmt: skip
        content = asdict(self)
        write_json(out / RECORD, {_DIGEST: sha256_of_values(content), **content, "table": rows})


_RECORDS = TypeAdapter(Record)


@contextmanager
def sole_sweep(out: Path) -> Iterator[Record]:
    """What an earlier sweep recorded in its directory, which is locked and made where it is not there.

    UserError where it cannot be written, holds something else, or another sweep runs there.
    """
    check_writable(out)
    _read(out)  # before anything is made there
    lock = FileLock(out / _LOCK)
    with explained(f"{out}: cannot be written"):
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{out}: another sweep runs there; wait for it, or choose another directory") from None
    try:
        yield _read(out)
    finally:
        lock.release()


def _read(out: Path) -> Record:
    """The record, empty where there is none; nothing is changed but what a killed process left of it."""
    remove_leftovers(out / RECORD)
    content = read_object_if_present(out / RECORD)
    if content is None:
        others = sorted(path.name for path in out.iterdir() if path.name != _LOCK) if out.is_dir() else []
        if others:
            raise UserError(
                f"{out}: holds something else than a sweep ({name_some(others, 3)}); choose another directory"
            )
        return Record()
    content.pop("table", None)
    digest = content.pop(_DIGEST, None)
    if digest not in (None, sha256_of_values(content)):
        raise UserError(
            f"{out / RECORD}: was changed or damaged; restore it from a copy, or remove it and choose another directory"
        )
    try:
        return _RECORDS.validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{out / RECORD}: not the record of a sweep: {where[:80]!r}: {first['msg']}") from None


def _as_read(value: Any) -> Any:
    """As it will be when it is read back."""
    return json.loads(json.dumps(value, default=str))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], free: set[str]) -> Iterator[str]:
    """What differs beside what is free to: keys, what lies in them, and fingerprints of what they name."""
    sections = {key.partition(".")[0] for key in free}
    for key in sorted(before.keys() | now.keys()):
        print_of = key.removeprefix("fingerprint of ").partition(" ")[0]
        named_by = "" if print_of == key else "data" if print_of == "data" else "base"
        if key in free or named_by in sections or any(key.startswith(f"{each}.") for each in free):
            continue
        if before.get(key) != now.get(key):
            was, is_now = where_they_differ(*(str(values.get(key, "not there")) for values in (before, now)))
            yield f"{key} was {was}, is {is_now}"
