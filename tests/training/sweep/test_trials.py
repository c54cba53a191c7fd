"""Points that Optuna chooses, where it is installed; without it, the loop around it and the refusal."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from peftune.config.recipe import Recipe
from peftune.errors import UserError
from peftune.training.export.adapter import Delivery
from peftune.training.sweep import sweep as module
from peftune.training.sweep.grid import Grid, Values, read_grid
from peftune.training.sweep.record import RECORD
from peftune.training.sweep.results import Row, RunResult
from peftune.training.sweep.sweep import sweep
from peftune.training.sweep.trials import propose

RANGES = ["optim.lr=1e-5..1e-2", "lora.rank=4,8,16", "lora.targets=all,[c_attn]", "batch.global_size=8..64"]
needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is not installed")


@pytest.fixture
def source(tmp_path: Path, tiny_base: Path, corpus: Path) -> Path:
    path = tmp_path / "r.yaml"
    data = f"data: {{train: {corpus}, validation: 0.3}}"
    path.write_text(f"base: {tiny_base}\n{data}\nrun: {{out: {tmp_path / 'out'}, seed: 3}}\n")
    return path


def judged(values: Values) -> Row:
    """A row whose loss is lowest at a rate of 1e-3, rank 8 and all targets."""
    loss = (
        3 + math.log(values["optim.lr"] / 1e-3) ** 2 + abs(values["lora.rank"] - 8) + (values["lora.targets"] != "all")
    )
    return Row(str(values), values, {0: RunResult("delivered", 1, loss)}, "delivered", loss)


@needs_optuna
def test_points_lie_in_their_ranges_are_new_and_come_nearer_to_the_best(source: Path) -> None:
    grid = read_grid(source, RANGES, may_be_range=True)
    rows: list[Row] = []
    for _ in range(8):
        points = propose(grid, rows, 5)
        assert points == propose(grid, rows[::-1], 5), "the same for the same rows, so that a cut sweep goes on alike"
        rows += map(judged, points)
    assert len({row.name for row in rows}) == 40
    for row in rows:
        assert (
            1e-5 <= row.values["optim.lr"] <= 1e-2 and f"{row.values['optim.lr']:.3g}" == f"{row.values['optim.lr']:g}"
        )
        assert row.values["lora.rank"] in (4, 8, 16) and row.values["lora.targets"] in ("all", ["c_attn"])
        assert type(row.values["batch.global_size"]) is int and 8 <= row.values["batch.global_size"] <= 64
    assert len(grid.members([row.values for row in rows])) == 40, "each is a recipe"
    rates = sorted(row.values["optim.lr"] for row in rows[:10])
    assert rates[2] < 1e-3, "drawn by their logarithm: evenly, one of ten would be below"
    first, last = (sum(row.loss or 0 for row in part) for part in (rows[:10], rows[30:]))
    assert last < first / 2


@needs_optuna
def test_a_failed_point_and_one_of_another_grid_are_no_hindrance(source: Path) -> None:
    grid = read_grid(source, ["optim.lr=1e-5..1e-2", "lora.rank=4,8"], may_be_range=True)
    failed = {"optim.lr": 9e-3, "lora.rank": 4}
    outside, other = {"optim.lr": 1.0, "lora.rank": 99}, {"optim.warmup": 0.1}
    rows = [Row(str(v), v, {0: RunResult("failed")}, "failed") for v in (failed, outside, other)]
    assert len(propose(grid, rows, 3)) == 3


@needs_optuna
def test_of_values_alone_each_is_tried_once(source: Path) -> None:
    grid = read_grid(source, ["lora.rank=4,8,16"], may_be_range=True)
    assert sorted(point["lora.rank"] for point in propose(grid, [], 9)) == [4, 8, 16]


class Trained(list[str]):
    """Stands for the fleet: names of what it was given; the loss of a run is its rate."""

    def __call__(self, recipes: Sequence[Recipe], until: float = 1.0) -> list[Any]:
        self += [Path(recipe.run.out).name for recipe in recipes]
        figures = {"perplexity": 1.0, "bits_per_byte": 1.0, "tokens": 9}
        before = {"loss": 5.0, **figures}
        after = [{"loss": recipe.optim.lr, **figures} for recipe in recipes]
        return [
            Delivery(Path(recipe.run.out), 1, {"v": {"base": before, "adapter": reached}}, 1.0)
            for recipe, reached in zip(recipes, after, strict=True)
        ]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The loop alone: eight points a batch, at rates of 1, 2, 3 …, of which none is trained."""
    fleet = Trained()

    def proposed(grid: Grid, rows: Sequence[Row], count: int) -> list[Values]:
        return [{"optim.lr": float(len(rows) + number)} for number in range(1, count + 1)]

    monkeypatch.setattr(module, "train_fleet", fleet)
    monkeypatch.setattr(module, "propose", proposed)
    monkeypatch.setattr(module, "require_optuna", lambda: None)
    return fleet


def test_as_many_points_are_tried_as_were_asked_for_and_more_can_follow(source: Path, trained: Trained) -> None:
    grid = read_grid(source, ["optim.lr=1..100"], may_be_range=True)
    found, failure = sweep(grid, trials=11)
    assert failure is None and trained == [f"lr{n}" for n in range(1, 12)] and len(found.rows) == 11
    sweep(grid, trials=11)
    assert len(trained) == 11
    sweep(grid, trials=12)
    assert trained[11:] == ["lr12"]


def test_trials_that_were_cut_begin_with_those_that_were_proposed(source: Path, trained: Trained) -> None:
    grid = read_grid(source, ["optim.lr=1..100"], seeds=2, may_be_range=True)
    sweep(grid, trials=10)
    path = grid.out / RECORD
    record = json.loads(path.read_text())
    for name in ("lr9", "lr10-seed4"):
        record["runs"][name]["result"] = {"ending": "not run"}
    path.write_text(json.dumps(record))
    del trained[:]
    found, _ = sweep(grid, trials=10)
    assert sorted(trained) == ["lr10", "lr10-seed4", "lr9", "lr9-seed4"], "with all their seeds; what is finished stays"
    assert len(found.rows) == 10 and all(len(row.results) == 2 for row in found.rows)


@pytest.mark.skipif(importlib.util.find_spec("optuna") is not None, reason="Optuna is installed")
def test_without_optuna_trials_are_refused_and_its_extra_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Optuna, which is not installed; pip install 'peftune\[sweep\]'"):
        sweep(read_grid(source, ["optim.lr=1e-5..1e-2"], may_be_range=True), trials=3)
    assert not (tmp_path / "out").exists()
