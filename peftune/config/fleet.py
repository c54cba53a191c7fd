"""Many recipes for one run: files, and the entries of a file's `fleet`, each what one adapter has otherwise."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftune.config.messages import short, validation_messages
from peftune.config.overrides import apply_override, section_of
from peftune.config.recipe import FLEET, Recipe, known_keys
from peftune.config.yaml_loader import read_yaml
from peftune.errors import UserError, refuse_bare_string

_MOST = 1_024  # adapters of one run
_VALUES = 200_000  # of all entries of a file, what they share counted for each
_TOLD = 50  # adapters whose problems stand in one message
_NAMES = ("validation", "where")  # their keys are a person's own names: one mapping takes the place of another
_LONGEST = 255  # bytes of a name that file systems take
_OUT = ("run", "out")


@dataclass(frozen=True)
class FleetRecipe:
    """One adapter of a run, as a file tells of it."""

    file: str
    entry: str
    """`fleet[2] (poems)`; empty for a file that is one recipe."""
    values: dict[str, Any]
    """What a recipe file of its own would say, with overrides applied."""
    problems: list[str]
    recipe: Recipe | None = None
    """None where the values are no recipe."""

    def label(self) -> str:
        """Where it is, for a message."""
        return ": ".join(filter(None, (self.file, self.entry)))


def load_recipes(paths: Sequence[str | Path], overrides: list[str] | None = None) -> list[Recipe]:
    """Check several recipes for one run, with `key=value` overrides applied to each.

    A file is one recipe, or has a list `fleet` with an entry for each adapter: what that one has otherwise than the
    rest of the file, and a `name`, which is its directory inside of `run.out`. UserError names every problem of all of
    them in one line, and two that would write to the same directory.
    """
    members = read_fleet(paths, overrides)
    refuse_problems(members)
    return [member.recipe for member in members if member.recipe is not None]


def read_fleet(paths: Sequence[str | Path], overrides: list[str] | None = None) -> list[FleetRecipe]:
    """The adapters of these files, each with the problems that it has; UserError for overrides that are none."""
    refuse_bare_string(paths, "paths")
    refuse_bare_string(overrides, "overrides")
    for override in overrides or []:
        apply_override({}, override)
        if override.partition("=")[0].split(".")[0] == FLEET:
            raise UserError(f"override {short(override)}: a fleet is written in a file; expected a key of a recipe")
    members: list[FleetRecipe] = []
    for path in paths:
        members += _members_of(Path(path), overrides or [])
        if len(members) > _MOST:
            raise UserError(f"more than {_MOST:,} adapters, the most of one run; start several runs")
    if not members:
        raise UserError("no recipe is given; expected at least one YAML file")
    sound = [member for member in members if not member.problems]
    _check_directories(sound)
    if members[1:]:
        _check_company(sound)
    return members


def refuse_problems(members: Sequence[FleetRecipe]) -> None:
    """UserError with the problems of all of them, if there are any; what all entries of a file have is told once."""
    lines = []
    for file, entries in itertools.groupby(members, key=lambda member: member.file):
        group = list(entries)
        first, *others = [dict.fromkeys(member.problems) for member in group if member.values] or [{}]
        shared = dict.fromkeys(p for p in first if others and all(p in other for other in others))
        lines += _line(file, "", [*shared])
        for member in group:
            lines += _line(file, member.entry, [problem for problem in member.problems if problem not in shared])
    if lines:
        raise UserError("; ".join(lines[:_TOLD] + ["more adapters have problems"] * (len(lines) > _TOLD)))


def names_of(recipes: Sequence[Recipe]) -> list[str]:
    """What each adapter is called: the last part of its directory, or all of it where two would be called the same."""
    last = [os.path.basename(os.path.abspath(recipe.run.out)) for recipe in recipes]
    return [recipe.run.out if last.count(name) > 1 else name for recipe, name in zip(recipes, last, strict=True)]


def _line(file: str, entry: str, problems: list[str]) -> list[str]:
    return [": ".join(filter(None, (file, entry, "; ".join(problems))))] if problems else []


def _members_of(path: Path, overrides: list[str]) -> list[FleetRecipe]:
    try:
        values = read_yaml(path)
    except UserError as error:
        return [FleetRecipe("", "", {}, [str(error)])]
    if FLEET not in values:
        return [_checked(str(path), "", values, [], overrides)]
    entries = values.pop(FLEET)
    if problem := _against_fleet(entries, values):
        return [FleetRecipe(str(path), "", {}, [problem])]
    members, wrong = [], 0
    for number, entry in enumerate(entries):
        members.append(_of_entry(str(path), number, entry, values, overrides))
        wrong += bool(members[-1].problems)
        if wrong > _TOLD:  # no more are told, and a thousand times the same takes half a minute
            break
    return members


def _against_fleet(entries: Any, rest: dict[str, Any]) -> str | None:
    """What is wrong with the list as a whole."""
    if not isinstance(entries, list) or not entries:
        expected = "expected a list with an entry for each adapter, such as [{name: a, lora.rank: 4}]"
        return f"{FLEET}: {expected}, found {short(entries)}"
    if len(entries) > _MOST:
        return f"{FLEET}: {len(entries):,} entries; expected at most {_MOST:,}"
    if (size := len(entries) * _size(rest) + _size(entries)) > _VALUES:
        return f"{FLEET}: {len(entries):,} entries with {size:,} values in all; expected at most {_VALUES:,}"
    return None


def _of_entry(file: str, number: int, entry: Any, rest: dict[str, Any], overrides: list[str]) -> FleetRecipe:
    where = f"{FLEET}[{number}]"
    if not isinstance(entry, dict):
        expected = "expected a mapping of what this adapter has otherwise than the rest of the file"
        return FleetRecipe(file, where, {}, [f"{expected}, found {short(entry)}"])
    values, given, name = _copy(rest), sorted(_keys(entry)), None
    twice = [key for key, other in itertools.pairwise(given) if other[: len(key)] == key]
    problems = [f"{'.'.join(key)[:80]} is given twice" for key in twice]
    if "name" not in entry:
        problems += ["give it a name, or a run.out of its own"] * (_OUT not in given)
    elif wrong := _against_name(entry["name"]):
        where += f" ({short(entry['name'])})"
        problems.append(wrong)
    else:
        name = entry["name"]
        where += f" ({name})"
        problems += ["give name, or run.out, not both"] * (_OUT in given)
    for key, value in entry.items():
        try:
            section, last = section_of(values, str(key), short(key)) if key != "name" else ({}, "name")
            section[last] = _laid_over(section.get(last), value, last)
        except UserError as error:
            problems.append(str(error))
    return _checked(file, where, values, problems, overrides, name)


def _against_name(name: Any) -> str | None:
    if not isinstance(name, str):
        return f"name: expected text, found {short(name)}"
    if not 0 < len(name.encode()) <= _LONGEST or name[0] == "." or not name.isprintable() or set(name) & set("/\\"):
        return f"name: expected the name of a directory, with no slash and no dot before it, found {short(name)}"
    return None


def _keys(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys that an entry sets, in their parts."""
    if not isinstance(value, dict) or (key and key[-1] in _NAMES) or not value:
        yield key
        return
    for inner, inside in value.items():
        yield from _keys(inside, (*key, str(inner)) if key else tuple(str(inner).split(".")))


def _laid_over(old: Any, new: Any, key: str) -> Any:
    """What a key holds after an entry: a section has the keys of both, anything else is that of the entry."""
    if not isinstance(old, dict) or not isinstance(new, dict) or key in _NAMES:
        return _copy(new)
    return old | {inner: _laid_over(old.get(inner), value, str(inner)) for inner, value in new.items()}


def _copy(value: Any) -> Any:
    """With a part of its own wherever the file repeats one by its name, so that a change to one stays there."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _size(value: Any) -> int:
    """Values in all."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_size, inner))


def _checked(
    file: str, entry: str, values: dict[str, Any], problems: list[str], overrides: list[str], name: str | None = None
) -> FleetRecipe:
    """Apply overrides, put the name below the directory, and validate."""
    for override in overrides:
        try:
            apply_override(values, override)
        except UserError as error:
            problems.append(str(error))
    run = values.get("run")
    if name and isinstance(run, dict) and isinstance(run.get("out"), str) and run["out"]:
        run["out"] = os.path.join(run["out"], name)
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        keys = known_keys()
        problems += validation_messages(error, keys if entry else keys | {"": [*keys[""], FLEET]})
    return FleetRecipe(file, entry, values, problems, recipe)


def _check_directories(members: Sequence[FleetRecipe]) -> None:
    """Add a problem to each that would write where another does, or that begins with what another is to make."""
    owners: dict[str, FleetRecipe] = {}
    places = [(member, _place(member.recipe.run.out), member.recipe.run) for member in members if member.recipe]
    for member, place, run in places:
        if place in owners:
            member.problems.append(f"run.out {run.out} is also that of {owners[place].label()}")
        owners.setdefault(place, member)
    for member, place, run in places:
        for above in (Path(place), *Path(place).parents):
            if above.name == "checkpoints" and (owner := owners.get(str(above.parent))):
                member.problems.append(f"run.out {run.out} lies in the checkpoints of {owner.label()}")
        if run.init is not None and (owner := owners.get(_place(run.init))) is not None:
            member.problems.append(f"run.init {run.init} is what {owner.label()} makes: train that in a run before")


def _check_company(members: Sequence[FleetRecipe]) -> None:
    """Add a problem to each that cannot be one of several in a run."""
    runs = [(member, member.recipe.run) for member in members if member.recipe]
    for member, run in runs:
        if run.track:
            member.problems.append(
                "run.track: trackers log one run at a time; leave it out, each has its metrics.jsonl"
            )
        if run.device != runs[0][1].device:
            first = f"{runs[0][0].label()} has {runs[0][1].device}"
            member.problems.append(f"run.device is {run.device}, {first}; recipes that run together need one")


def _place(directory: str) -> str:
    return os.path.normcase(os.path.realpath(directory))
