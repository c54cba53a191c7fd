"""`peftune sweep`: the verb from end to end on the tiny base, and calls that are refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from journey import parse

from peftune.cli import main
from peftune.config.recipe import load_recipe
from peftune.training.sweep.grid import MOST, read_grid
from peftune.training.sweep.record import RECORD
from peftune.training.sweep.written import BEST, PICTURE, TABLE

DOCS = Path(__file__).parents[2] / "docs"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe of 4 steps in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"the cat {n} sat on a mat and a dog ran to {n % 3} logs"} for n in range(12)]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.yaml").write_text(
        f"base: {tiny_base}\ndata: {{train: text.jsonl, validation: 0.4}}\noptim: {{steps: 4, warmup: 0}}\n"
        "batch: {global_size: 2}\nrun: {out: swept, precision: fp32, eval_every: 1, save_every: 0}\n"
    )
    return "r.yaml"


def test_a_sweep_ends_with_its_table_and_the_recipe_that_was_best(recipe: str, capsys: Captured) -> None:
    assert main.run(["sweep", recipe, "optim.lr=1e-3,1e-2,1e30", "lora.rank=2"]) == 2
    assert "optim.lr: expected a number less than or equal to" in capsys.readouterr().err
    assert not Path("swept").exists()

    assert main.run(["sweep", recipe, "optim.lr=1e-3,1e-2,1e9", "lora.rank=2"]) == 0, "one of three has failed"
    said = capsys.readouterr().out
    table = [line.strip("│ ").split("│") for line in said.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in table] == ["0.01", "1e-3", "1e9"]
    assert [row[-1].strip() for row in table] == ["delivered", "delivered", "failed"]
    loss = json.loads(Path("swept/lr0.01/peftune.json").read_text())["metrics"]["validation"]["adapter"]["loss"]
    assert table[0][1].strip() == f"{loss:.4f}" and "best" in table[0][3]
    for words in ("One seed each", "before training", "failed: lr1e9: ", "peftune train swept/best.yaml"):
        assert words in said
    best = load_recipe("swept/best.yaml")
    assert (best.optim.lr, best.lora.rank, best.run.out) == (0.01, 2, "swept/best")
    assert main.run(["train", "swept/best.yaml", "--dry-run"]) == 0
    assert {path.name for path in Path("swept").iterdir()} == {
        "lr1e-3", "lr0.01", "lr1e9", "sweep.json", "sweep.csv", "sweep.png", "best.yaml", ".lock",
    }  # fmt: skip

    capsys.readouterr()
    assert main.run(["sweep", recipe, "optim.lr=1e-3,1e-2", "lora.rank=2", "--seeds", "2", "-q"]) == 0
    said, err = capsys.readouterr()
    assert err == "" and "± over seeds" in said and "2 of 2 seeds" in said and "taken seed by seed" in said
    assert "optim.lr=0.01 is the" not in said, "the failed one lies beyond it"


def test_where_nothing_is_delivered_the_first_failure_decides_the_exit_code(recipe: str, capsys: Captured) -> None:
    assert main.run(["sweep", recipe, "optim.lr=9e8,1e9"]) == 4
    said, err = capsys.readouterr()
    assert "nothing was delivered" in said and err.splitlines()[-1].startswith("peftune: ")
    assert not Path("swept/best.yaml").exists() and Path("swept/sweep.csv").read_text().count("failed") == 2


REFUSED = {
    "r.yaml": "nothing to compare; give several values of a key",
    "none.yaml optim.lr=1,2": "none.yaml: cannot read the recipe",
    "r.yaml optim.lr=1,2 data.validation=0": "set data.validation",
    "r.yaml optim.lr=1,2 --halving 2 --trials 3": "--halving and --trials exclude each other",
    "r.yaml optim.lr=1,2 --halving 1": "--halving",
    "r.yaml optim.lr=1,2 --seeds 0": "--seeds",
    "r.yaml optim.lr=1..2": "a range needs a number of trials",
    "r.yaml optim.lr=1,2 --out .": "holds something else than a sweep (r.yaml, text.jsonl)",
    "r.yaml optim.lr=1,2 --out text.jsonl": "text.jsonl",
}


@pytest.mark.parametrize(("call", "words"), REFUSED.items(), ids=REFUSED)
def test_a_sweep_that_cannot_work_is_refused_in_one_line(call: str, words: str, recipe: str, capsys: Captured) -> None:
    assert main.run(["sweep", *call.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"r.yaml", "text.jsonl"}


@pytest.mark.parametrize("page", ["sweep.md", "guide.md"])
def test_the_commands_of_the_pages_are_understood(page: str, recipe: str, capsys: Captured) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^(peftune sweep .*)$|`(peftune sweep [^`]*=[^`]*)`", text, re.MULTILINE)
    calls = [shlex.split(block or inline, comments=True)[2:] for block, inline in found]
    assert calls
    for words in calls:
        parse(shlex.join(["peftune", "sweep", *words]))
        axes = [word for word in words[1:] if "=" in word]
        grid = read_grid(Path(recipe), axes, out=Path("new"), may_be_range="--trials" in words)
        assert len(grid.axes) == len(axes) and grid.members(grid.combinations())


def test_the_page_says_what_the_code_has() -> None:
    page = (DOCS / "sweep.md").read_text(encoding="utf-8")
    assert f"At most {MOST:,} runs" in page
    assert [name for name in (RECORD, TABLE, PICTURE, BEST) if f"`{name}`" not in page] == []
    assert "`rank8-lr2e-4-batch32`" in page.replace("sweeps/poems/", "")


def test_a_sweep_is_one_process(recipe: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.run(["sweep", recipe, "optim.lr=1,2"]) == 2
    assert "a sweep is one process" in capsys.readouterr().err
