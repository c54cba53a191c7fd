"""Many recipes for one run: each is what a file of its own would say, and all that is wrong is told at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import damaged_values, deadline, fuzz, read_or_refuse
from hypothesis import given

from peftune.config.fleet import load_recipes, names_of
from peftune.config.recipe import Recipe, load_recipe, recipe_from
from peftune.errors import UserError

REST: dict[str, Any] = {
    "base": "gpt2",
    "data": {"train": {"path": "a.txt", "text": "t"}, "validation": {"docs": "d.txt"}},
    "lora": {"rank": 8, "targets": ["c_attn", "c_fc"]},
    "run": {"out": "adapters"},
}


def written(path: Path, fleet: Any, **rest: Any) -> Path:
    path.write_text(yaml.safe_dump(REST | rest | {"fleet": fleet}))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fleet.yaml"


def refusal(paths: list[Path], *overrides: str) -> str:
    """The one line that recipes are refused with."""
    with pytest.raises(UserError) as caught, deadline(60):
        load_recipes(paths, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def alone(**changes: Any) -> Recipe:
    """The recipe of one adapter, as a file of its own would have it."""
    return recipe_from(REST | changes, [])


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"lora": {"rank": 4}}, {"lora": REST["lora"] | {"rank": 4}}),
    ({"lora.rank": 4}, {"lora": REST["lora"] | {"rank": 4}}),
    ({"lora.rank": 4, "lora": {"alpha": 8}, "optim.lr": 1e-3},
     {"lora": REST["lora"] | {"rank": 4, "alpha": 8}, "optim": {"lr": 1e-3}}),
    ({"lora.targets": ["c_proj"]}, {"lora": REST["lora"] | {"targets": ["c_proj"]}}),
    ({"lora": {"targets": "all"}}, {"lora": REST["lora"] | {"targets": "all"}}),
    ({"base": "distilgpt2"}, {"base": "distilgpt2"}),
    ({"data": {"train": {"path": "b.txt"}}},
     {"data": {"train": {"path": "b.txt", "text": "t"}, "validation": {"docs": "d.txt"}}}),
    ({"data.train": ["b.txt"]}, {"data": {"train": ["b.txt"], "validation": {"docs": "d.txt"}}}),
    ({"data": {"validation": {"code": "c.txt"}}}, {"data": REST["data"] | {"validation": {"code": "c.txt"}}}),
    ({"data.validation.code": "c.txt"},
     {"data": REST["data"] | {"validation": {"docs": "d.txt", "code": "c.txt"}}}),
    ({"run": {"seed": 3}}, {"run": {"seed": 3}}),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "expected"), CHANGES, ids=[str(entry) for entry, _ in CHANGES])
def test_an_entry_is_what_its_adapter_has_otherwise(
    file: Path, entry: dict[str, Any], expected: dict[str, Any]
) -> None:
    first, second = load_recipes([written(file, [{"name": "a", **entry}, {"name": "b"}])])
    assert first == alone(**expected | {"run": {"out": "adapters/a"} | expected.get("run", {})})
    assert second == alone(run={"out": "adapters/b"}), "nothing of one entry reaches the next"


def test_a_directory_is_named_or_given(file: Path) -> None:
    fleet = [{"name": "a"}, {"run.out": "elsewhere/b"}, {"run": {"out": "~/c"}}]
    found = load_recipes([written(file, fleet)])
    assert [recipe.run.out for recipe in found] == ["adapters/a", "elsewhere/b", str(Path("~/c").expanduser())]
    assert names_of(found) == ["a", "b", "c"]
    twice = load_recipes([written(file, [{"run.out": "x/a"}, {"run.out": "y/a/"}, {"run.out": "y/b"}])])
    assert names_of(twice) == ["x/a", "y/a/", "b"]


def test_an_override_wins_over_file_and_entries(file: Path, tmp_path: Path) -> None:
    path = written(file, [{"name": "a", "lora.rank": 4}, {"name": "b", "optim": {"lr": 1.0}}], optim={"steps": 3})
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(REST | {"run": {"out": "c"}}))
    found = load_recipes([path, plain], ["lora.rank=2", "optim={lr: 5e-5}"])
    assert [(recipe.lora.rank, recipe.optim.lr, recipe.optim.steps) for recipe in found] == [(2, 5e-5, None)] * 3
    assert [recipe.run.out for recipe in found] == ["adapters/a", "adapters/b", "c"]
    assert [recipe.run.out for recipe in load_recipes([path], ["run.out=new"])] == ["new/a", "new/b"]
    several = refusal([path, plain, plain], "run.out=new")
    assert several == f"{plain}: run.out new is also that of {plain}"
    both = refusal([written(file, [{"run.out": "x"}, {"run.out": "y"}])], "run.out=z")
    assert both == f"{file}: fleet[1]: run.out z is also that of {file}: fleet[0]"


def test_one_file_and_one_recipe_are_as_load_recipe_reads_them(file: Path) -> None:
    file.write_text(yaml.safe_dump(REST))
    assert load_recipes([file], ["lora.rank=4"]) == [load_recipe(file, ["lora.rank=4"])]
    for overrides in (["lora.rnk=4", "optim.lr=0"], ["optim.lr"], ["base.x=1"]):
        with pytest.raises(UserError) as caught:
            load_recipe(file, overrides)
        assert str(caught.value) in refusal([file], *overrides)


def test_a_part_that_a_file_repeats_is_changed_in_one_place(file: Path) -> None:
    file.write_text(
        "base: gpt2\nrun: {out: a}\ndata: {train: &s {path: a.txt}, validation: {a: *s}}\n"
        "fleet:\n- &e {name: a, lora: {rank: 4}}\n- {<<: *e, name: b}\n"
    )
    first, second = load_recipes([file], ["data.train.path=b.txt", "lora.alpha=3"])
    assert isinstance(first.data.validation, dict)
    assert (first.data.train[0].path, first.data.validation["a"][0].path) == ("b.txt", "a.txt")
    assert (second.run.out, second.lora.rank, second.lora.alpha) == ("a/b", 4, 3)


WRONG: list[tuple[Any, str]] = [
    ([], "fleet: expected a list with an entry for each adapter, such as [{name: a, lora.rank: 4}], found []"),
    (None, "fleet: expected a list"),
    ({"a": {"lora.rank": 4}}, "fleet: expected a list"),
    ("a", "fleet: expected a list"),
    (3, "fleet: expected a list"),
    ([3], "fleet[0]: expected a mapping of what this adapter has otherwise than the rest of the file, found 3"),
    ([None], "fleet[0]: expected a mapping"),
    ([{}], "fleet[0]: give it a name, or a run.out of its own"),
    ([{"name": "a", "run.out": "b"}], "fleet[0] (a): give name, or run.out, not both"),
    ([{"name": "a", "run": {"out": "b"}}], "fleet[0] (a): give name, or run.out, not both"),
    ([{"name": 8}], "fleet[0] (8): name: expected text, found 8"),
    ([{"name": None}], "fleet[0] (nothing): name: expected text, found nothing"),
    *(
        ([{"name": name}], "name: expected the name of a directory, with no slash and no dot before it")
        for name in ("", "..", ".a", "/", "a/b", "a\\b", "a\nb", "é" * 128, "a\0", "\x1b[2J")
    ),
    ([{"name": "a", "lora.rank": 4, "lora": {"rank": 8}}], "fleet[0] (a): lora.rank is given twice"),
    ([{"name": "a", "lora": None, "lora.rank": 8}], "fleet[0] (a): lora is given twice"),
    ([{"name": "a", "data": {"validation": 0}, "data.validation.x": "y"}], "(a): data.validation is given twice"),
    ([{"name": "a", "base.x": 4}], "fleet[0] (a): 'base.x': base is not a section"),
    ([{"name": "a", "a." * 5_000 + "b": 4}], "no key of a recipe lies so deep; expected one"),
    ([{"name": "a", "lora": 3}], "fleet[0] (a): lora: expected a section"),
    ([{"name": "a", "lora.rnk": 3}], "fleet[0] (a): unknown key lora.rnk, did you mean rank?"),
    ([{"name": "a", "fleet": [{"name": "b"}]}], "fleet[0] (a): unknown key fleet"),
    ([{"name": "a", 1: 3}], "fleet[0] (a): unknown key 1"),
    ([{"name": "a"}, {"name": "a"}], "fleet[1] (a): run.out adapters/a is also that of"),
    ([{"name": "a"}, {"run.out": "./x/../adapters/a/"}], "is also that of"),
    ([{"name": "a"}, {"run.out": "adapters/a/checkpoints/b"}], "/b lies in the checkpoints of"),
    ([{"run.out": "adapters/a/checkpoints"}, {"name": "a"}],
     "fleet[0]: run.out adapters/a/checkpoints lies in the checkpoints of"),
    ([{"name": "a"}, {"name": "b", "run.init": "adapters/a"}], "fleet[1] (b): run.init adapters/a is what"),
    ([{"run.out": f"a{n}"} for n in range(1025)], "fleet: 1,025 entries; expected at most 1,024"),
]  # fmt: skip


@pytest.mark.parametrize(("fleet", "expected"), WRONG, ids=[str(fleet)[:60] for fleet, _ in WRONG])
def test_a_fleet_that_makes_no_sense_is_refused_with_where_it_is(file: Path, fleet: Any, expected: str) -> None:
    line = refusal([written(file, fleet)])
    assert line.startswith(f"{file}: fleet") and expected in line
    assert line.count("; ") <= expected.count("; ") or "twice" in line, "one problem is told once"
    assert len(line) < 900


def test_a_link_to_a_directory_is_that_directory(file: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fleet = [{"run.out": str(tmp_path / "real" / "a")}, {"run.out": str(tmp_path / "link" / "a")}]
    assert "is also that of" in refusal([written(file, fleet)])


def test_all_problems_of_all_are_told_at_once_and_shared_ones_once(file: Path, tmp_path: Path) -> None:
    path = written(file, [{"name": "a", "lora.rank": 0}, {"name": "b"}, {"name": "c", "optim.lr": "fast"}, 3], bas="x")
    (tmp_path / "text.yaml").write_text("hello")
    line = refusal([path, tmp_path / "none.yaml", tmp_path / "text.yaml"], "run.seed=-1")
    problems = line.split("; ")
    assert problems[0].startswith(f"{path}: run.seed: expected a number greater")
    assert problems[1] == "unknown key bas, did you mean base?"
    assert problems[2].startswith(f"{path}: fleet[0] (a): lora.rank: expected a number")
    assert problems[3].startswith(f"{path}: fleet[2] (c): optim.lr: expected a number, found 'fast'")
    assert problems[4].startswith(f"{path}: fleet[3]: expected a mapping")
    assert problems[5] == f"{tmp_path}/none.yaml: cannot read the recipe: No such file or directory"
    assert problems[6].startswith(f"{tmp_path}/text.yaml: expected a mapping with base, data and run")
    assert len(problems) == 7


def test_the_directory_of_named_entries_may_be_missing_in_each_way(file: Path) -> None:
    for run in ({}, {"out": 3}, {"out": ""}, 3, None):
        assert "run" in refusal([written(file, [{"name": "a"}, {"name": "b"}], run=run)])


def test_what_is_no_list_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match="paths is one str"):
        load_recipes(str(file))
    with pytest.raises(UserError, match="overrides is one str"):
        load_recipes([file], "lora.rank=3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no recipe is given"):
        load_recipes([])
    written(file, [{"name": "a"}])
    assert "a fleet is written in a file" in refusal([file], "fleet=[{name: b}]")
    assert "a fleet is written in a file" in refusal([file], "fleet.name=b")


def test_one_recipe_is_not_read_from_a_fleet(file: Path) -> None:
    for recipe in (written(file, [{"name": "a"}]), REST | {"fleet": []}):
        with pytest.raises(UserError, match=r"holds a fleet.*peftune train.*load_recipes.*expected one recipe here$"):
            load_recipe(recipe)
    assert "unknown key flet, did you mean fleet?" in refusal([_plain(file, {"flet": []})])


def _plain(path: Path, more: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(REST | more))
    return path


def test_many_wrong_entries_are_told_soon(file: Path) -> None:
    began = time.process_time()
    unknown = {f"unknown{n}": 1 for n in range(170)}
    line = refusal([written(file, [{"name": f"a{n}"} for n in range(1_024)], **unknown)])
    assert line.count("unknown key unknown9,") == 1
    line = refusal([written(file, [{"name": f"a{n}", "lora.rank": -n} for n in range(1_024)])])
    assert line.endswith("greater than or equal to 1, found -49; more adapters have problems")
    assert time.process_time() - began < 20


def test_as_many_values_as_many_entries_repeat_are_refused_soon(file: Path) -> None:
    sources = {"train": [f"{n}.txt" for n in range(5_000)]}
    began = time.process_time()
    line = refusal([written(file, [{"name": f"a{n}"} for n in range(1_024)], data=sources)])
    assert "1,024 entries with 5," in line and "expected at most 200,000" in line
    assert len(load_recipes([written(file, [{"name": f"a{n}"} for n in range(1_024)])])) == 1_024
    with pytest.raises(UserError, match=r"more than 1,024 adapters"):
        load_recipes([file, _plain(file.with_name("one.yaml"), {})])
    assert time.process_time() - began < 30


VALID = [
    {"name": "a", "lora.rank": 4, "data": {"train": [{"path": "b"}]}},
    {"run": {"out": "o"}, "optim": {"lr": 1e-3}, "data.validation.x": "y"},
]


@fuzz(60)
@given(fleet=damaged_values({"fleet": VALID}))
def test_any_fleet_is_read_or_refused(fleet: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed-fleet.yaml"
    try:
        path.write_text(yaml.safe_dump(REST | fleet if isinstance(fleet, dict) else fleet, allow_unicode=True))
    except (yaml.YAMLError, RecursionError, UnicodeError):
        return
    with deadline():
        read_or_refuse(lambda: load_recipes([path]))
