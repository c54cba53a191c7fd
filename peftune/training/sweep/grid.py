"""The grid of a sweep: `key=v1,v2` makes an axis, and each combination is a recipe with a name of its own."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftune.config.messages import short
from peftune.config.overrides import apply_override
from peftune.config.recipe import Recipe, known_keys, recipe_from, values_of_one
from peftune.config.yaml_loader import parse_yaml
from peftune.errors import UserError

MOST = 1024  # members
_LONGEST = 80  # characters of a name, without what makes it unique
_CALLED = {"global_size": "batch", "micro_size": "micro"}
_ALONE = "recipe"  # name of the combination where nothing but the seed varies
_RANGE = re.compile(r"([^.,]*\.?[^.,]*)\.\.([^.,]*\.?[^.,]*)")
_WRITTEN = ("run.out", "run.seed", "run.resume")  # what the sweep itself decides


@dataclass(frozen=True)
class Range:
    """An axis of numbers from `low` to `high`, both included."""

    low: float
    high: float

    @property
    def is_log(self) -> bool:
        """Whether its numbers are drawn evenly by their logarithm."""
        return self.low > 0 and self.high >= 10 * self.low


Values = dict[str, Any]
"""A value for each axis, by its key."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: a combination with one seed."""

    name: str
    combination: str
    values: Values
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """What a recipe file says, with what is varied."""

    source: str
    recipe: dict[str, Any]
    axes: dict[str, list[Any] | Range]
    out: Path
    seeds: int = 1

    def combinations(self) -> list[Values]:
        """Every combination; of a range its two ends."""
        ends = [[a.low, a.high] if isinstance(a, Range) else a for a in self.axes.values()]
        if (count := math.prod(map(len, ends)) * self.seeds) > MOST:
            raise UserError(f"{count:,} runs; expected at most {MOST:,}: leave out values or seeds")
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*ends)]

    def overrides(self, values: Values) -> list[str]:
        """A combination as it is given on the command line."""
        return [f"{key}={_as_yaml(value)}" for key, value in values.items()]

    def recipe_with(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The values of the recipe with these overrides."""
        values = copy.deepcopy(self.recipe)
        for override in overrides:
            apply_override(values, override)
        return values

    def members(self, combinations: Sequence[Values]) -> list[PlannedRun]:
        """The runs of these combinations, the seeds of each side by side; UserError with all that is wrong with them.

        The first seed, which is the recipe's, adds nothing to the name, so that more seeds can be added later.
        """
        problems: dict[str, None] = {}
        found, same = list[PlannedRun](), dict[str, str]()
        for values, name in zip(combinations, _names(combinations), strict=True):
            seed = None
            for number in range(self.seeds):
                full = name if number == 0 else f"{name}-seed{(seed or 0) + number}"
                changes = [*self.overrides(values), f"run.out={_as_yaml(str(self.out / full))}"]
                changes += [] if seed is None else [f"run.seed={seed + number}"]
                try:
                    recipe = recipe_from(self.recipe, changes, "")
                except UserError as error:
                    problems |= dict.fromkeys(str(error).removeprefix(": ").split("; "))
                    break
                problems |= dict.fromkeys(_against(recipe))
                seed = recipe.run.seed if seed is None else seed
                found.append(PlannedRun(full, name, values, recipe))
                learnt, text = recipe.model_dump_json(exclude={"run": {"out"}}), " ".join(self.overrides(values))
                if learnt in same:
                    problems[f"{same[learnt]} and {text} are one and the same recipe"] = None
                same[learnt] = text
        if problems:
            raise UserError(f"{self.source}: {'; '.join(problems)}")
        return found


def read_grid(
    path: Path, changes: Sequence[str], seeds: int = 1, out: Path | None = None, may_be_range: bool = False
) -> Grid:
    """Read a recipe file and the `key=value` changes to it, of which those with several values are axes.

    `out` is the sweep's directory (default: the recipe's `run.out`). UserError for what makes no grid.
    """
    plain, axes = list[str](), dict[str, list[Any] | Range]()
    for change in changes:
        key, _, text = change.partition("=")
        parts, ends = _parts(text), _RANGE.fullmatch(text.strip())
        low, high = map(_number, ends.groups()) if ends else (None, None)
        if low is not None and high is not None:
            if not may_be_range:
                raise UserError(f"{short(change)}: a range needs a number of trials; a grid needs values: {key}=v1,v2")
            if not low < high:
                raise UserError(f"{short(change)}: expected a range from a lower to a higher number")
            axis: list[Any] | Range = Range(low, high)
        elif len(parts) > 1:
            if "" in parts:
                raise UserError(f"{short(change)}: an empty value beside a comma; expected {key}=v1,v2")
            axis = [_value(key, part) for part in parts]
        else:
            plain.append(change)
            continue
        if key in axes:
            raise UserError(f"{key} is given twice; give all of its values at once, {key}=v1,v2")
        if key in _WRITTEN:
            raise UserError(f"{key} cannot be varied: each run has a directory of its own, and seeds are no choice")
        axes[key] = axis
    values = values_of_one(path)
    for change in plain:
        apply_override(values, change)
    if not axes and seeds == 1:
        raise UserError("nothing to compare; give several values of a key, such as optim.lr=1e-4,2e-4,4e-4")
    if out is None:
        run = values.get("run")
        named = run.get("out") if isinstance(run, dict) else None
        if not isinstance(named, str) or not named:
            raise UserError(f"{path}: run.out is missing; name a directory for the sweep")
        out = Path(named)
    ordered = {key: axes[key] for key in sorted(axes, key=_place)}
    return Grid(str(path), values, ordered, Path(os.path.expanduser(out)), seeds)


def value_text(value: Any) -> str:
    """A value as short as people write it: 2e-4, 0.05, 16, all, [0, 1]."""
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return value if isinstance(value, str) else _as_yaml(value)
    if isinstance(value, float) and value and (abs(value) < 0.01 or abs(value) >= 1e7):
        mantissa, _, exponent = f"{value:.9e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _against(recipe: Recipe) -> Iterable[str]:
    """What in a recipe does not go with a sweep."""
    if recipe.data.validation == 0:
        yield "a sweep compares validation losses; set data.validation, to a fraction such as 0.05 or to files"
    if recipe.run.resume == "never":
        yield "run.resume is never, but a sweep goes on with what is there; use auto"
    if recipe.run.track:
        yield "run.track: trackers log one run at a time; leave it out, each run has its metrics.jsonl"


def _parts(text: str) -> list[str]:
    """A text cut at the commas that stand outside of brackets and quotes."""
    parts, depth, quote, before = [""], 0, "", ","
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            before = ","
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and before in ",[{:":  # elsewhere it is an apostrophe
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        parts[-1] += letter
        before = before if letter.isspace() else letter
    return [part.strip() for part in parts]


def _value(key: str, text: str) -> Any:
    """What an override would set."""
    values: Any = {}
    apply_override(values, f"{key}={text}")
    for part in key.split("."):
        values = values[part]
    return values


def _number(text: str) -> float | None:
    try:
        value = parse_yaml(text)
    except ValueError:
        return None
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _as_yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _place(key: str) -> tuple[int, int]:
    """Where a key stands among those of a recipe, so that names do not depend on the order in which axes are given."""
    keys = known_keys()
    section, _, field = key.partition(".")
    field = field.partition(".")[0]
    top, inside = keys[""], keys.get(section, [])
    return (
        top.index(section) if section in top else len(top),
        inside.index(field) if field in inside else len(inside),
    )


def _names(combinations: Sequence[Values]) -> list[str]:
    """A name for each combination: from its values, safe as that of a file, unlike every other in any case."""
    found = []
    for values in combinations:
        last = [key.rpartition(".")[2] for key in values]
        parts = []
        for key, name, value in zip(values, last, values.values(), strict=True):
            label = _CALLED.get(name, name) if last.count(name) == 1 else key
            text = _safe(value_text(value))
            parts.append(f"{_safe(label)}{'' if text[:1].isdigit() else '-'}{text}")
        found.append("-".join(parts) or _ALONE)
    often = Counter(name.casefold() for name in found)
    return [
        name if often[name.casefold()] == 1 and len(name) <= _LONGEST else f"{name[:_LONGEST]}-{_digest(values)}"
        for name, values in zip(found, combinations, strict=True)
    ]


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._") or "empty"


def _digest(values: Values) -> str:
    return hashlib.sha256(_as_yaml(values).encode()).hexdigest()[:8]
