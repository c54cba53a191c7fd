"""Many recipes in one call: which arguments are recipes, what is printed of each adapter, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftune.cli import main
from peftune.cli.launcher import configuration
from peftune.cli.options import recipes_and_overrides
from peftune.cli.output.fleet_results import print_results
from peftune.config.fleet import load_recipes
from peftune.config.recipe import Recipe, recipe_from
from peftune.errors import CheckFailed, PeftuneError, ReportedElsewhere, UserError
from peftune.training.export.adapter import Delivery

Captured = pytest.CaptureFixture[str]


def write(path: str, base: Path | str, **sections: Any) -> str:
    recipe: dict[str, Any] = {
        "base": str(base),
        "data": {"train": "text.txt", "validation": 0.3},
        "lora": {"rank": 4},
        "optim": {"lr": 1e-2, "steps": 2},
        "batch": {"global_size": 2},
        "run": {"out": f"out/{Path(path).stem}", "precision": "fp32", "eval_every": 0, "save_every": 0},
    }
    Path(path).write_text(yaml.safe_dump(recipe | sections), encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a text."""
    monkeypatch.chdir(tmp_path)
    lines = [f"the cat sat on mat {n} and the dog on log {n * n}" for n in range(20)]
    Path("text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return tmp_path


def refusal(capfd: Captured, *arguments: str) -> str:
    """The one line that a call is refused with."""
    capfd.readouterr()
    assert main.run(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("peftune: ") and err.count("\n") == 1, err
    return err


def test_a_later_argument_is_an_override_where_it_looks_like_one(here: Path) -> None:
    given = [
        "b.yaml", "optim.lr=1e-4", "data.validation.My poems=held.txt", "lr=2", "lora.rnk=3", "runs/lr=1e-4/c.yaml",
        "base=a.yaml", "run.out=", "./d=1.yaml", "/e.yml",
    ]  # fmt: skip
    recipes, overrides = recipes_and_overrides(Path("a=1.yaml"), given)
    assert [str(path) for path in recipes] == ["a=1.yaml", "b.yaml", "runs/lr=1e-4/c.yaml", "d=1.yaml", "/e.yml"]
    assert overrides == [text for text in given if "=" in text and "/" not in text.partition("=")[0]]
    (here / "recipe").write_text("x")
    assert recipes_and_overrides(Path("a"), ["recipe"])[0][1] == Path("recipe")
    assert recipes_and_overrides(Path("a"), None) == ([Path("a")], [])


@pytest.mark.parametrize("argument", ["optim.lr", "=3", "Optim.LR=3", "none", "x" * 5_000, "a\0b", "optim. lr"])
def test_what_is_neither_recipe_nor_override_is_refused_as_such(here: Path, argument: str, capfd: Captured) -> None:
    write("a.yaml", "gpt2")
    for verb in (["train"], ["train", "--dry-run"], ["launch", "cpu", "--dry-run"]):
        line = refusal(capfd, *verb, "a.yaml", argument)
        assert "expected a recipe, a YAML file, or KEY=VALUE such as optim.lr=1e-4" in line and len(line) < 300


def test_all_that_is_wrong_with_all_recipes_is_one_line(here: Path, capfd: Captured) -> None:
    first, second = write("a.yaml", "gpt2", lora={"rank": 0}), write("b.yaml", "gpt2", lr=3)
    for verb in (["train"], ["train", "--dry-run"], ["launch", "cpu", "--dry-run"]):
        line = refusal(capfd, *verb, first, second, "none.yaml", "optim.steps=0")
        for words in ("a.yaml: lora.rank: ", "b.yaml: optim.steps: ", "unknown key lr, did you mean optim.lr?"):
            assert line.count(words) == 1, words
        assert line.endswith("none.yaml: cannot read the recipe: No such file or directory\n")
    assert not Path("out").exists()
    assert "b.yaml: run.out same is also that of a.yaml" in refusal(
        capfd, "train", write("a.yaml", "gpt2"), write("b.yaml", "gpt2"), "run.out=same"
    )


def test_a_verb_that_takes_one_recipe_says_so_of_a_fleet(here: Path, capfd: Captured) -> None:
    path = write("fleet.yaml", "gpt2", fleet=[{"name": "a"}])
    assert "holds a fleet, many recipes in one file, which `peftune train`" in refusal(capfd, "plan", path)


def test_a_dry_run_prints_each_adapter_as_a_document(here: Path, tiny_base: Path, capfd: Captured) -> None:
    fleet = [{"name": "a"}, {"name": "b", "lora.rank": 2, "batch.global_size": 3}]
    path, other = write("fleet.yaml", tiny_base, fleet=fleet), write("c.yaml", tiny_base)
    before = sorted(here.rglob("*"))
    for verb in (["train"], ["launch", "cpu-2"]):
        assert main.run([*verb, path, other, "optim.lr=1e-3", "--dry-run"]) == 0
        out = capfd.readouterr().out
        assert sorted(here.rglob("*")) == before
        documents = list(yaml.safe_load_all(out))
        resolved = [recipe_from(document, []) for document in documents]
        given = load_recipes([path, other], ["optim.lr=1e-3"])
        assert [recipe.run.out for recipe in resolved] == ["out/fleet/a", "out/fleet/b", "out/c"]
        assert [(r.lora, r.optim) for r in resolved] == [(r.lora, r.optim) for r in given]
        assert out.count("# steps: 2 of ") == out.count("# memory of a rank") == 3
        assert ("2 ranks, DDP" in out) == (verb[0] == "launch")


def test_what_several_adapters_cannot_have_in_one_run_is_told_before_it_begins(
    here: Path, tiny_base: Path, capfd: Captured
) -> None:
    fleet = [{"name": "a"}, {"name": "b", "run.track": ["tensorboard"]}, {"name": "c", "run.device": "cpu"}]
    path = write("fleet.yaml", tiny_base, fleet=fleet)
    line = refusal(capfd, "train", path)
    assert "fleet[1] (b): run.track: trackers log one run at a time" in line
    assert f"fleet[2] (c): run.device is cpu, {path}: fleet[0] (a) has auto; recipes that run together need one" in line
    for config in ("cpu-2-zero1", "cpu-2-zero3"):
        line = refusal(capfd, "launch", config, path, "run.track=[]", "run.device=cpu", "--dry-run")
        assert line.startswith("peftune: ZeRO shards the state of one adapter; ")


def test_a_dry_run_tells_the_problems_of_all_adapters_together(here: Path, tiny_base: Path, capfd: Captured) -> None:
    fleet = [
        {"name": "a", "data.train": "none.txt"},
        {"name": "b", "lora.rnk": 2, "data.train": "absent.txt"},
        {"name": "c", "run.track": ["mlflow"]},
    ]
    line = refusal(capfd, "train", write("fleet.yaml", tiny_base, fleet=fleet), "--dry-run", "data.validation=0")
    entries = ("fleet[0] (a): none.txt: ", "fleet[1] (b): unknown key lora.rnk", "fleet[2] (c): run.track")
    for words in (*entries, "absent.txt: "):
        assert line.count(words) == 1, (words, line)
    (here / "base").mkdir()
    line = refusal(capfd, "train", write("fleet.yaml", "./base", fleet=[{"name": "a"}, {"name": "b"}]), "--dry-run")
    assert line.count("base ./base") == 1 and "fleet[" not in line, "what all have is told once"


def test_a_launcher_hands_all_recipes_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def become(target: list[str]) -> None:
        started.append(target)
        raise UserError("enough")

    monkeypatch.setattr(configuration.LaunchOptions, "apply", lambda _: None)
    monkeypatch.setattr(configuration, "become_the_rank", become)
    assert main.run(["launch", "cpu", "a.yaml", "b.yaml", "optim.lr=1"]) == 2
    assert started == [["-m", "peftune", "train", "a.yaml", "b.yaml", "optim.lr=1"]]


def recipes(*names: str) -> list[Recipe]:
    return [recipe_from({"base": "x", "data": {"train": "y"}, "run": {"out": f"out/{name}"}}, []) for name in names]


def delivery(name: str) -> Delivery:
    return Delivery(Path("out") / name, 7, {}, 3.0)


def printed(results: list[object], speaks: bool = True) -> PeftuneError | None:
    """The error that a run of these results ends with."""
    try:
        print_results(recipes(*"abc"), results, speaks)
    except PeftuneError as error:
        return error
    return None


def test_each_adapter_is_a_line_and_the_first_failure_is_the_exit_code(capsys: Captured) -> None:
    assert printed([delivery("a"), delivery("b"), delivery("c")]) is None
    out, err = capsys.readouterr()
    assert (out, err) == ("".join(f"out/{name}: adapter of step 7, 3 s\n" for name in "abc"), "")
    error = printed([delivery("a"), CheckFailed("not\nfinite"), delivery("c")])
    assert error is not None and (error.exit_code, str(error)) == (4, "2 of 3 adapters are delivered; b: not\nfinite")
    assert capsys.readouterr() == ("out/a: adapter of step 7, 3 s\nout/c: adapter of step 7, 3 s\n", "")
    error = printed([CheckFailed("x\ny"), UserError("z"), delivery("c")])
    assert error is not None and (error.exit_code, str(error)) == (4, "1 of 3 adapters is delivered; not: a, b")
    assert capsys.readouterr() == ("out/c: adapter of step 7, 3 s\n", "peftune: a: x y\npeftune: b: z\n")
    error = printed([UserError("z"), CheckFailed("x"), delivery("c")], speaks=False)
    assert isinstance(error, ReportedElsewhere) and error.exit_code == 2
    assert capsys.readouterr() == ("", ""), "of several ranks the first speaks"


def test_a_fleet_is_trained_as_each_alone_and_one_that_fails_is_told(
    here: Path, tiny_base: Path, distance: Callable[[Path, Path], float], capfd: Captured
) -> None:
    fleet = [{"name": "a"}, {"name": "gone", "data.train": "none.txt"}, {"name": "b", "lora.rank": 2, "run.seed": 1}]
    path = write("fleet.yaml", tiny_base, fleet=fleet)
    command = [sys.executable, "-m", "peftune", "train", path, "optim.steps=3", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    first, second = done.stdout.splitlines()
    assert first.startswith("out/fleet/a: adapter of step 3, ") and second.startswith("out/fleet/b: adapter of step 3,")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("peftune: 2 of 3 adapters are delivered; gone: none.txt: ")
    solo = ["train", write("solo.yaml", tiny_base), "optim.steps=3", "lora.rank=2", "run.seed=1"]
    assert main.run([*solo, "run.out=solo"]) == 0
    assert distance(Path("solo"), Path("out/fleet/b")) < 1e-6
    assert main.run([*solo, "run.out=out/fleet/b"]) == 0
    assert "this recipe was trained already, nothing to do" in capfd.readouterr().err, "it is that of a solo run"
