"""Sweeps of real runs on the tiny base: equal to runs alone, gone on with, pruned, and refused before anything runs."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from peftune.config.recipe import Recipe, load_recipe
from peftune.errors import CheckFailed, UserError
from peftune.training.fleet.members import Outcome
from peftune.training.metrics import read_metrics
from peftune.training.run import train
from peftune.training.sweep import sweep as module
from peftune.training.sweep.grid import Grid, read_grid
from peftune.training.sweep.record import RECORD
from peftune.training.sweep.results import Results
from peftune.training.sweep.sweep import sweep
from peftune.training.sweep.written import write_results

AXES = ["lora.rank=2,4", "optim.lr=1e-3,3e-2"]


@pytest.fixture(scope="module")
def source(tiny_base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 8 steps that is evaluated at every second."""
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    values = {
        "base": str(tiny_base), "data": {"train": str(corpus), "validation": 0.3}, "lora": {"alpha": 8},
        "optim": {"steps": 8, "warmup": 0}, "batch": {"global_size": 2, "micro_size": 2},
        "run": {"out": "-", "precision": "fp32", "eval_every": 2, "save_every": 0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def swept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Results]:
    """The sweep of two ranks and two rates, finished and summed up."""
    grid = read_grid(source, AXES, out=tmp_path_factory.mktemp("sweeps") / "two")
    found, failure = sweep(grid)
    assert failure is None
    write_results(grid, found)
    return grid, found


@pytest.fixture
def copy(swept: tuple[Grid, Results], tmp_path: Path) -> Grid:
    """The finished sweep in a directory that may be changed."""
    shutil.copytree(swept[0].out, tmp_path / "copy")
    return replace(swept[0], out=tmp_path / "copy")


Calls = list[tuple[list[str], float]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What is asked of the fleet: names and share of the steps; it trains all the same."""
    made: Calls = []
    real = module.train_fleet

    def recorded(recipes: Sequence[Recipe], until: float = 1.0) -> list[Outcome]:
        made.append(([Path(recipe.run.out).name for recipe in recipes], until))
        return real(recipes, until=until)

    monkeypatch.setattr(module, "train_fleet", recorded)
    return made


def test_the_table_is_that_of_runs_alone(swept: tuple[Grid, Results], tmp_path: Path) -> None:
    grid, found = swept
    assert len(found.rows) == 4
    alone = {}
    for member in grid.members(grid.combinations()):
        solo = train(load_recipe(grid.source, [*grid.overrides(member.values), f"run.out={tmp_path / member.name}"]))
        alone[member.name] = solo.metrics["validation"]["adapter"]["loss"]
    assert {row.name: row.loss for row in found.rows} == pytest.approx(alone, abs=1e-6)
    assert [row.name for row in found.rows] == sorted(alone, key=lambda name: alone[name])
    assert found.rows[0].against_best == 0 and found.rows[3].against_best == pytest.approx(
        max(alone.values()) - min(alone.values()), abs=1e-6
    )


def test_files_hold_what_the_table_holds(swept: tuple[Grid, Results]) -> None:
    grid, found = swept
    assert (grid.out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with (grid.out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["combination"], float(line["loss"])) for line in lines] == [(r.name, r.loss) for r in found.rows]
    assert lines[0]["lora.rank"] in ("2", "4") and {line["state"] for line in lines} == {"delivered"}
    table = json.loads((grid.out / RECORD).read_text())["table"]
    assert [(row["combination"], row["loss"]) for row in table] == [(row.name, row.loss) for row in found.rows]


def test_the_best_recipe_is_the_one_that_was_best_with_a_directory_of_its_own(swept: tuple[Grid, Results]) -> None:
    grid, found = swept
    (member,) = [m for m in grid.members(grid.combinations()) if m.name == found.rows[0].name]
    best = load_recipe(grid.out / "best.yaml")
    assert best.run.out == str(grid.out / "best") and not Path(best.run.out).exists()
    assert best.model_copy(update={"run": member.recipe.run}) == member.recipe


def test_the_same_call_trains_nothing_again(copy: Grid, swept: tuple[Grid, Results]) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.out.glob("rank*/*.safetensors")}
    # The copy lies elsewhere, and a run may be moved.
    again, failure = sweep(copy)
    assert failure is None and again == swept[1]
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 4


def test_another_grid_is_added_and_all_stand_in_one_table(copy: Grid, source: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.out.glob("rank*/*.safetensors")}
    grid = read_grid(source, ["lora.rank=2", "optim.lr=3e-2,9e-2"], out=copy.out)
    found, _ = sweep(grid)
    assert {row.name for row in found.rows} == {
        "rank2-lr1e-3", "rank2-lr0.03", "rank4-lr1e-3", "rank4-lr0.03", "lr0.03", "lr0.09",
    }  # fmt: skip
    values = {row.name: row.values for row in found.rows}
    assert values["lr0.09"] == {"lora.rank": 2, "optim.lr": 0.09}, "what is no axis of its grid is in its recipe"
    assert found.axes == {"lora.rank": [2, 4], "optim.lr": [1e-3, 3e-2, 9e-2]}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    losses = {row.name: row.loss for row in found.rows}
    assert losses["lr0.03"] == losses["rank2-lr0.03"]


def test_a_contradiction_is_refused_before_anything_runs(copy: Grid, source: Path, calls: Calls) -> None:
    for changes, words in (
        ([*AXES, "optim.steps=9"], "rank2-lr1e-3: optim.steps was 8, is 9"),
        (["lora.rank=2,3", "optim.steps=9"], "optim.steps was 8, is 9"),
        ([*AXES, "run.seed=3"], "run.seed was 0, is 3"),
    ):
        with pytest.raises(UserError, match="holds a sweep of another recipe") as caught:
            sweep(read_grid(source, changes, out=copy.out))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert calls == []


def test_a_directory_with_something_else_is_refused_and_left_alone(source: Path, tmp_path: Path, calls: Calls) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for content, words in (
        (None, r"holds something else than a sweep \(notes\.txt\)"), ("[]", "expected an object"),
        ('{"runs": 3}', "not the record of a sweep: 'runs'"), ("{", "cannot be read"),
        ('{"runs": {"a": {"combination": "a"}}}', "not the record of a sweep"),
    ):  # fmt: skip
        if content is not None:
            (tmp_path / RECORD).write_text(content)
        with pytest.raises(UserError, match=words):
            sweep(read_grid(source, AXES, out=tmp_path))
        assert {path.name for path in tmp_path.iterdir()} <= {"notes.txt", RECORD}
    assert calls == [] and (tmp_path / RECORD).read_text() == content


def test_what_no_run_could_do_is_refused_with_all_reasons_before_anything_is_written(
    source: Path, tmp_path: Path, calls: Calls
) -> None:
    (tmp_path / "equal.txt").write_text("the cat sat\n\nthe cat sat\n")
    for changes, words in (
        (["lora.targets=[nothing],[none]"], ["nothing", "none"]),
        (["lora.rank=2,4", "data.block_size=999"], ["has only 64 positions"]),
        (["lora.rank=2,4", f"data.train={tmp_path / 'equal.txt'}"], ["holds out nothing"]),
        (["data.validation=0.2,0.5"], ["not all are validated on the same text", "tokens of validation"]),
        (["lora.rank=2,4", "run.out=x", f"base={tmp_path / 'none'}"], [f"{tmp_path / 'none'}"]),
    ):
        with pytest.raises(UserError) as caught:
            sweep(read_grid(source, changes, out=tmp_path / "new"))
        assert all(word in str(caught.value) for word in words), caught.value
    assert calls == [] and not (tmp_path / "new").exists()


def test_a_failure_stands_in_the_table_and_harms_nobody(source: Path, tmp_path: Path) -> None:
    found, failure = sweep(read_grid(source, ["optim.lr=1e-3,1e9"], out=tmp_path / "new"))
    assert [row.ending for row in found.rows] == ["delivered", "failed"]
    assert isinstance(failure, CheckFailed) and "finite" in str(failure)
    assert found.rows[1].failed == {0: " ".join(str(failure).split())}


def test_halving_leaves_out_the_worse_half_of_combinations_twice_with_all_of_their_seeds(
    source: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = read_grid(source, ["optim.lr=1e-6,1e-4,3e-2"], seeds=2, out=tmp_path / "new")
    found, _ = sweep(grid, halving=2)
    assert [(row.name, row.ending, row.steps) for row in found.rows] == [
        ("lr0.03", "delivered", 8), ("lr1e-4", "left out", 4), ("lr1e-6", "left out", 2),
    ]  # fmt: skip
    assert [(len(names), until) for names, until in calls] == [(6, 0.25), (4, 0.5), (2, 1.0)]
    events = read_metrics(grid.out / "lr1e-6-seed1")
    at_two = [event["loss"] for event in events if event["event"] == "eval" and event["step"] == 2]
    assert found.rows[2].results[1].loss == at_two[0]
    rungs = json.loads((grid.out / RECORD).read_text())["rungs"]
    assert [(rung["share"], rung["kept"]) for rung in rungs] == [(0.25, ["lr0.03", "lr1e-4"]), (0.5, ["lr0.03"])]

    del calls[:]
    again, _ = sweep(grid, halving=2)
    assert again == found and [until for _, until in calls] == [1.0], "decisions are taken once"


def test_where_all_fail_before_the_first_decision_the_first_failure_is_told(source: Path, tmp_path: Path) -> None:
    found, failure = sweep(read_grid(source, ["optim.lr=8e8,9e8"], out=tmp_path / "new"), halving=2)
    assert isinstance(failure, CheckFailed) and [row.ending for row in found.rows] == ["failed", "failed"]


def test_what_is_finished_is_judged_by_what_it_had_reached_at_the_rung(copy: Grid, source: Path, calls: Calls) -> None:
    grid = read_grid(source, ["lora.rank=2,4", "optim.lr=1e-3,3e-2,2e-2"], out=copy.out)
    sweep(grid, halving=2)
    rung = json.loads((copy.out / RECORD).read_text())["rungs"][0]
    for name, (loss,) in rung["losses"].items():
        events = read_metrics(copy.out / name)
        assert [e["loss"] for e in events if e["event"] == "eval" and e["step"] == 2] == pytest.approx([loss])


def test_halving_without_an_early_evaluation_is_refused(source: Path, tmp_path: Path, calls: Calls) -> None:
    for every in (0, 3):
        with pytest.raises(UserError, match=r"lr1e-3 takes 8 steps .* 25% of them; evaluate every 2 or more often"):
            sweep(read_grid(source, ["optim.lr=1e-3,1e-2", f"run.eval_every={every}"], out=tmp_path / "x"), halving=2)
    assert calls == []


def test_a_sweep_that_was_cut_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = read_grid(source, ["optim.lr=1e-3,1e-2"], out=tmp_path / "new")
    real = module.train_fleet

    def cut(recipes: Sequence[Recipe], until: float = 1.0) -> list[Outcome]:
        real(recipes[:1], until=until)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "train_fleet", cut)
        sweep(grid)
    (first,) = grid.out.glob("*/adapter_model.safetensors")
    before = first.stat().st_mtime_ns
    found, failure = sweep(grid)
    assert failure is None and [row.ending for row in found.rows] == ["delivered"] * 2
    assert first.stat().st_mtime_ns == before
