"""A sweep from top to bottom: check every recipe, train them as a fleet, leave out the worse where asked, sum up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftune.config.recipe import Recipe
from peftune.console import Console, counted
from peftune.data.batches import total_steps
from peftune.errors import PeftuneError, UserError
from peftune.training.fleet.members import Outcome
from peftune.training.fleet.train_fleet import train_fleet
from peftune.training.inputs import RunInputs, read_inputs
from peftune.training.run_directory import identity_of
from peftune.training.sweep.grid import Grid, PlannedRun
from peftune.training.sweep.pruning import kept, loss_at, rungs
from peftune.training.sweep.record import Record, Rung, sole_sweep
from peftune.training.sweep.results import Results, result_of
from peftune.training.sweep.trials import propose, require_optuna

Prints = dict[str, dict[str, Any]]
"""Fingerprints of base and data, by kind of recipe."""
_BATCH = 8  # trials that are proposed together
_FLEET = 32  # runs that learn side by side: each holds its adapter, a gradient and two moments in memory


@dataclass(frozen=True)
class _Work:
    """A sweep in progress."""

    grid: Grid
    record: Record
    prints: Prints
    console: Console = field(default_factory=Console)
    failures: list[PeftuneError] = field(default_factory=list)

    def add(self, members: Sequence[PlannedRun]) -> None:
        """Record what is to be trained, before it is."""
        self.record.add(members, [_recorded(member.recipe, self.prints) for member in members], self.grid.out)
        self.record.write(self.grid.out)


def sweep(grid: Grid, halving: int | None = None, trials: int | None = None) -> tuple[Results, PeftuneError | None]:
    """Train what a grid describes in its directory, where the same call goes on; the table, and the first failure.

    With `halving` a share 1 / halving of the combinations goes on at each rung (`pruning`); with `trials` so many
    points are tried, which Optuna chooses. UserError, before anything is trained, for what cannot work.
    """
    if trials is not None:
        require_optuna()
    members = grid.members(grid.combinations())
    prints = _check(grid, members, halving)
    with sole_sweep(grid.out) as record:
        work = _Work(grid, record, prints)
        if trials is not None:
            _try(work, trials)
        else:
            work.add(members)
            seeds = "" if grid.seeds == 1 else f", {grid.seeds} seeds each"
            work.console.say(f"{counted(len(members) // grid.seeds, 'combination')}{seeds} in {grid.out}")
            _train(work, members if halving is None else _halve(work, members, halving))
        return record.results(), work.failures[0] if work.failures else None


def _train(work: _Work, members: Sequence[PlannedRun], until: float = 1.0) -> list[Outcome]:
    """Train members up to a share of their steps, a fleet after the other, and record after each how they ended."""
    found: list[Outcome] = []
    for begin in range(0, len(members), _FLEET):
        some = members[begin : begin + _FLEET]
        outcomes = train_fleet([member.recipe for member in some], until=until)
        for member, one in zip(some, outcomes, strict=True):
            work.record.runs[member.name].result = result_of(one)
        work.record.write(work.grid.out)
        found += outcomes
    work.failures.extend(one for one in found if isinstance(one, PeftuneError))
    return found


def _halve(work: _Work, members: list[PlannedRun], factor: int) -> list[PlannedRun]:
    """The members that are to be trained to the end; the seeds of a combination stay or go together."""
    for share in rungs(factor):
        losses: dict[str, list[float | None]] = {member.combination: [] for member in members}
        chosen = work.record.decision(share, list(losses))
        if chosen is None:
            found = _train(work, members, share)
            for member, one in zip(members, found, strict=True):
                losses[member.combination].append(loss_at(one, Path(member.recipe.run.out), share))
            chosen = kept(losses, factor)
            work.record.rungs.append(Rung(share, losses, chosen))
            work.record.write(work.grid.out)
        work.console.say(f"after {share:.0%} of the steps {len(chosen)} of {len(losses)} combinations go on")
        members = [member for member in members if member.combination in chosen]
    return members


def _try(work: _Work, trials: int) -> None:
    """Train points until there are so many combinations; a sweep that was cut begins with those it had proposed."""
    while True:
        rows = work.record.results().rows
        points = [row.values for row in rows if row.is_begun and row.values.keys() == work.grid.axes.keys()]
        points = points or propose(work.grid, rows, min(_BATCH, trials - len(rows)))
        if not points:
            return
        members = work.grid.members(points)
        work.add(members)
        work.console.say(f"{counted(len(points), 'point')} of {trials} trials")
        _train(work, members)


def _check(grid: Grid, members: list[PlannedRun], halving: int | None) -> Prints:
    """Read base and data of every kind of member, before one is trained; fingerprints by kind.

    UserError with all that is wrong: what `read_inputs` refuses, no validation text, or not the same for all.
    """
    read: dict[str, RunInputs | None] = {}
    problems, scored = dict[str, None](), dict[str, None]()
    for member in members:
        kind = _kind(member.recipe)
        if kind not in read:
            try:
                known = [one for one in read.values() if one is not None]
                read[kind] = read_inputs(member.recipe, lint=False, known=known)
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


def _against_halving(member: PlannedRun, blocks: int, factor: int) -> Iterator[str]:
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
