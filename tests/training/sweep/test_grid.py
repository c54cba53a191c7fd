"""Axes, combinations, names and overrides: what a sweep is made of, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peftune.errors import UserError
from peftune.training.sweep.grid import MOST, Grid, PlannedRun, Range, read_grid, value_text


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text("base: gpt2\ndata: {train: a.txt, validation: 0.1}\nrun: {out: adapters/a, seed: 7}\n")
    return path


def members(grid: Grid) -> list[PlannedRun]:
    return grid.members(grid.combinations())


def test_every_combination_is_a_recipe_with_a_directory_named_after_its_values(recipe: Path) -> None:
    changes = ["batch.global_size=8,32", "optim.lr=1e-4,2e-4", "lora.rank=4,8", "optim.epochs=2"]
    found = members(read_grid(recipe, changes))
    assert [member.name for member in found] == [
        f"rank{rank}-lr{lr}-batch{batch}" for rank in (4, 8) for lr in ("1e-4", "2e-4") for batch in (8, 32)
    ], "in the order of a recipe's keys, whatever the order of the axes"
    last = found[-1].recipe
    assert (last.lora.rank, last.optim.lr, last.batch.global_size, last.optim.epochs) == (8, 2e-4, 32, 2)
    assert last.run.out == "adapters/a/rank8-lr2e-4-batch32" and last.run.seed == 7


def test_lists_in_brackets_and_quoted_commas_are_values(recipe: Path) -> None:
    changes = ["lora.layers=[0,1],[2,3]", "data.train='x,y.txt', it's.txt", "lora.targets=[c_attn, mlp.c_fc]"]
    grid = read_grid(recipe, changes)
    assert grid.axes == {"data.train": ["x,y.txt", "it's.txt"], "lora.layers": [[0, 1], [2, 3]]}
    made = members(grid)[0].recipe
    assert (made.data.train[0].path, made.lora.layers, made.lora.targets) == ("x,y.txt", [0, 1], ["c_attn", "mlp.c_fc"])


def test_seeds_follow_that_of_the_recipe_and_the_first_adds_nothing_to_the_name(recipe: Path) -> None:
    found = members(read_grid(recipe, ["lora.rank=4,8"], seeds=3))
    assert [(m.name, m.recipe.run.seed) for m in found[:3]] == [("rank4", 7), ("rank4-seed8", 8), ("rank4-seed9", 9)]
    assert {m.combination for m in found} == {"rank4", "rank8"}


@pytest.mark.parametrize(
    "change",
    [
        "data.train=a/b.txt,a_b.txt,A_B.txt",
        "data.train=../x,/etc/passwd,~/y",
        f"data.train={'x' * 300},{'x' * 299}y",
        "data.train=naïve,na_ve,na\u202eve",
        "lora.targets=[c_attn],all,[mlp.c_fc, c_attn]",
        "data.validation={a: x.txt},{a: y.txt}",
        "optim.clip=null,1.0,0.5",
    ],
)
def test_names_are_those_of_files_and_differ_whatever_the_case(recipe: Path, change: str) -> None:
    names = [member.name for member in members(read_grid(recipe, [change], seeds=2))]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name) and name[-1] != "." for name in names), names
    assert len({name.casefold() for name in names}) == 2 * len(read_grid(recipe, [change]).combinations())


def test_a_name_does_not_depend_on_how_a_number_is_typed(recipe: Path) -> None:
    for typed in ("2e-4,.05", "0.0002,5e-2", "2.0E-4,0.050"):
        assert [m.name for m in members(read_grid(recipe, [f"optim.lr={typed}"]))] == ["lr2e-4", "lr0.05"]
    assert [value_text(value) for value in (16, 16.0, 1e-10, 2.5e-5, 1e9, True, None, "all")] == [
        "16", "16", "1e-10", "2.5e-5", "1e9", "true", "null", "all",
    ]  # fmt: skip


REFUSED = {
    "optim.lr=1e-4": "nothing to compare",
    "optim.lr=1e-4,": "an empty value beside a comma",
    "optim.lr": "expected key=value",
    "optim.lr=1e-4,2e-4 optim.lr=3e-4,4e-4": "optim.lr is given twice",
    "run.seed=1,2": "run.seed cannot be varied",
    "run.out=a,b": "run.out cannot be varied",
    "optim.lr=1e-5..1e-3": "a range needs a number of trials",
    "lora.alpha=8,8.0": "lora.alpha=8 and lora.alpha=8.0 are one and the same recipe",
    "lora.rank=8,8": "lora.rank=8 and lora.rank=8 are one and the same recipe",
    "lora.rank=4,8 data.validation=0": "set data.validation, to a fraction such as 0.05 or to files",
    "lora.rank=4,8 run.resume=never": "run.resume is never",
    "lora.rnk=4,8": "unknown key lora.rnk, did you mean rank?",
    "fleet=[1],[2]": "unknown key fleet",
    "optim.lr=[1,[2": "is not a YAML value",
    "a.b.c.d.e.f.g=1,2": "no key of a recipe lies so deep",
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.items(), ids=REFUSED)
def test_what_makes_no_sweep_is_refused_in_one_line(recipe: Path, changes: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        members(read_grid(recipe, changes.split()))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_all_problems_of_all_recipes_are_told_at_once_and_each_of_them_once(recipe: Path) -> None:
    changes = ["lora.rank=0,4", "optim.lr=-1,1e-4,2e-4", "batch.global_size=8,32", "batch.micro_size=16"]
    with pytest.raises(UserError) as caught:
        members(read_grid(recipe, changes))
    told = str(caught.value)
    for words in ("lora.rank: expected", "optim.lr: expected", "micro_size 16 is larger than global_size 8"):
        assert told.count(words) == 1
    assert "global_size 32" not in told


def test_there_is_a_bound(recipe: Path) -> None:
    values = ",".join(map(str, range(1, MOST + 1)))
    assert len(members(read_grid(recipe, [f"lora.rank={values}"]))) == MOST
    with pytest.raises(UserError, match="2,048 runs; expected at most 1,024"):
        members(read_grid(recipe, [f"lora.rank={values}"], seeds=2))


def test_a_range_is_an_axis_where_there_are_trials(recipe: Path) -> None:
    grid = read_grid(recipe, ["optim.lr=1e-5..1e-3", "lora.rank=4..8", "data.train=../a,b..c"], may_be_range=True)
    assert grid.axes["optim.lr"] == Range(1e-5, 1e-3) and Range(1e-5, 1e-3).is_log
    assert grid.axes["lora.rank"] == Range(4, 8) and not Range(4, 8).is_log
    assert len(grid.combinations()) == 8
    with pytest.raises(UserError, match="from a lower to a higher"):
        read_grid(recipe, ["optim.lr=1e-3..1e-5"], may_be_range=True)


def test_the_directory_is_that_of_the_recipe_or_the_one_given(recipe: Path, tmp_path: Path) -> None:
    assert members(read_grid(recipe, ["lora.rank=4,8", "run.out=b"]))[0].recipe.run.out == "b/rank4"
    assert members(read_grid(recipe, ["lora.rank=4,8"], out=tmp_path))[0].recipe.run.out == str(tmp_path / "rank4")
    recipe.write_text("base: gpt2\ndata: {train: a.txt, validation: 0.1}\n")
    with pytest.raises(UserError, match=r"run\.out is missing"):
        read_grid(recipe, ["lora.rank=4,8"])
    assert members(read_grid(recipe, ["lora.rank=4,8"], out=tmp_path))[1].recipe.run.out == str(tmp_path / "rank8")
