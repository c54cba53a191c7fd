"""A sweep from top to bottom: check every recipe, train them as a fleet, leave out the worse where asked, sum up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftune.config.recipe import Recipe
from peftune.console import Console, counted
from peftune.data.batches import total_steps
from peftune.errors import PeftuneError, UserError
from peftune.training.checkpoint import State
from peftune.training.export.adapter import Delivery
from peftune.training.identity import identity_of
from peftune.training.inputs import RunInputs, read_inputs
from peftune.training.sweep.grid import Grid, Member
from peftune.training.sweep.pruning import kept, loss_at, rungs
from peftune.training.sweep.record import Record, Rung, sole_sweep
from peftune.training.sweep.results import Results, outcome_of
from peftune.training.sweep.standin import train_fleet
from peftune.training.sweep.trials import propose, require_optuna

Found = Delivery | State | PeftuneError
Prints = dict[str, dict[str, Any]]
"""Fingerprints of base and data, by kind of recipe."""
_BATCH = 8  # trials that are proposed together


def sweep(grid: Grid, halving: int | None = None, trials: int | None = None) -> tuple[Results, PeftuneError | None]:
    """Train what a grid describes in its directory, where the same call goes on; the table, and the first failure.

    With `halving` a share 1 / halving of the combinations goes on at each rung (`pruning`); with `trials` so many
    points are tried, which Optuna chooses. UserError, before anything is trained, for what cannot work.
    """
    if trials is not None:
        require_optuna()
    ends = grid.members(grid.combinations())
    prints = _check(grid, ends, halving)
    console, errors = Console(), list[PeftuneError]()
    with sole_sweep(grid.out) as record:
        if trials is not None:
            errors = _try(grid, record, prints, trials, console)
        else:
            record.add(ends, [_recorded(member.recipe, prints) for member in ends], grid.out)
            record.write(grid.out)
            seeds = "" if grid.seeds == 1 else f", {grid.seeds} seeds each"
            console.say(f"{counted(len(ends) // grid.seeds, 'combination')}{seeds} in {grid.out}")
            members = ends if halving is None else _halve(ends, record, grid.out, halving, console)
            errors = _finish(members, record, grid.out)
        return record.results(), errors[0] if errors else None


def _finish(members: Sequence[Member], record: Record, out: Path) -> list[PeftuneError]:
    """Train to the end."""
    found = train_fleet([member.recipe for member in members])
    return _note(members, found, record, out)


def _note(members: Sequence[Member], found: Sequence[Found], record: Record, out: Path) -> list[PeftuneError]:
    """Record what came of members; what failed."""
    for member, one in zip(members, found, strict=True):
        record.runs[member.name].outcome = outcome_of(one)
    record.write(out)
    return [one for one in found if isinstance(one, PeftuneError)]


def _halve(members: list[Member], record: Record, out: Path, factor: int, console: Console) -> list[Member]:
    """The members that are to be trained to the end; the seeds of a combination stay or go together."""
    for share in rungs(factor):
        names = list(dict.fromkeys(member.combination for member in members))
        chosen = record.decision(share, names)
        if chosen is None:
            found = train_fleet([member.recipe for member in members], until=share)
            _note(members, found, record, out)
            losses: dict[str, list[float | None]] = {name: [] for name in names}
            for member, one in zip(members, found, strict=True):
                losses[member.combination].append(loss_at(one, Path(member.recipe.run.out), share))
            chosen = kept(losses, factor)
            record.rungs.append(Rung(share, losses, chosen))
            record.write(out)
        console.say(f"after {share:.0%} of the steps {len(chosen)} of {counted(len(names), 'combination')} go on")
        members = [member for member in members if member.combination in chosen]
    return members


def _try(grid: Grid, record: Record, prints: Prints, trials: int, console: Console) -> list[PeftuneError]:
    """Train points until there are so many combinations; a sweep that was cut begins with those it had proposed."""
    errors = list[PeftuneError]()
    while True:
        rows = record.results().rows
        points = [row.values for row in rows if row.is_begun and row.values.keys() == grid.axes.keys()]
        points = points or propose(grid, rows, min(_BATCH, trials - len(rows)))
        if not points:
            return errors
        members = grid.members(points)
        record.add(members, [_recorded(member.recipe, prints) for member in members], grid.out)
        record.write(grid.out)
        console.say(
            f"trials {len(record.results().rows) - len(points) + 1} to {len(record.results().rows)} of {trials}"
        )
        errors += _finish(members, record, grid.out)


def _check(grid: Grid, members: list[Member], halving: int | None) -> Prints:
    """Read base and data of every kind of member, before one is trained; fingerprints by kind.

    UserError with all that is wrong: what `read_inputs` refuses, no validation text, or not the same for all.
    """
    read: dict[str, RunInputs | None] = {}
    problems, scored = dict[str, None](), dict[str, None]()
    for member in members:
        kind = _kind(member.recipe)
        if kind not in read:
            try:
                read[kind] = read_inputs(member.recipe, lint=False)
            except UserError as error:
                read[kind], problems[str(error)] = None, None
        if (inputs := read[kind]) is None:
            continue
        texts = {name: blocks.tokens() for name, blocks in inputs.corpus.domains.items()}
        scored[", ".join(f"{tokens:,} tokens of {name}" for name, tokens in texts.items())] = None
        if not texts:
            problems["data.validation holds out nothing, and a sweep compares validation losses; name files"] = None
        if halving:
            problems |= dict.fromkeys(_against_halving(member, len(inputs.corpus.train), halving))
    if len(scored) > 1:
        texts_of = "; ".join(list(scored)[:3])
        problems[
            f"not all are validated on the same text ({texts_of}), so losses cannot be compared; name files in "
            "data.validation"
        ] = None
    if problems:
        raise UserError(f"{grid.source}: {'; '.join(list(problems)[:5])}")
    return {kind: _prints(inputs) for kind, inputs in read.items() if inputs is not None}


def _against_halving(member: Member, blocks: int, factor: int) -> Iterator[str]:
    """Where an evaluation comes too late for the first decision."""
    batch, optim, first = member.recipe.batch, member.recipe.optim, rungs(factor)[0]
    total = total_steps(blocks, batch.global_size, optim.epochs, optim.steps)
    most, every = max(1, int(total * first)), member.recipe.run.eval_every
    if not 0 < every <= most:
        yield (
            f"run.eval_every is {every}, but {member.combination} takes {total:,} steps and the first decision comes "
            f"after {first:.0%} of them; evaluate every {most:,} or more often"
        )


def _prints(inputs: RunInputs) -> dict[str, Any]:
    return {key: value for key, value in inputs.identity.items() if key.startswith("fingerprint of ")}


def _recorded(recipe: Recipe, prints: Prints) -> dict[str, Any]:
    """A recipe as it is recorded: what decides what it learns."""
    return identity_of(recipe, {}) | prints.get(_kind(recipe), next(iter(prints.values())))


def _kind(recipe: Recipe) -> str:
    """Equal for recipes that read the same and adapt the same modules."""
    values = recipe.model_dump(mode="json", include={"base", "quantize", "data", "lora"})
    if recipe.run.init is None:
        values["lora"] |= dict.fromkeys(("rank", "alpha", "dropout"))
    return json.dumps([values, recipe.run.init])
