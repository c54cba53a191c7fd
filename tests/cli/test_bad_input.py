"""What a person can get wrong, through the command line: one line on stderr, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftune.cli import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a corpus and a text."""
    monkeypatch.chdir(tmp_path)
    texts = ["the cat sat on the mat", "a dog ran to my log", "naïve café", "the dog and the cat sat on a log"] * 3
    Path("c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return tmp_path


def write_recipe(base: Path, **sections: Any) -> str:
    recipe: dict[str, Any] = {
        "base": str(base),
        "data": {"train": "c.jsonl", "validation": 0},
        "lora": {"rank": 4},
        "optim": {"lr": 1e-2, "steps": 2},
        "batch": {"global_size": 2, "micro_size": 2},
        "run": {"out": "out", "precision": "fp32", "eval_every": 0, "save_every": 0},
    }
    Path("r.yaml").write_text(yaml.safe_dump(recipe | sections), encoding="utf-8")
    return "r.yaml"


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a call is refused with; fails where files come or go, or it is refused in another way."""
    before = sorted(Path().rglob("*"))
    capfd.readouterr()
    assert main.run(list(arguments)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("peftune: "), lines
    assert sorted(Path().rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('lora.modules_to_save=[""]', "no module '' to train whole"),
        ("lora.modules_to_save=[h]", "no module 'h' to train whole"),
        ("lora.modules_to_save=[transformer]", "no module 'transformer' to train whole"),
        ("lora.modules_to_save=[attn]", "no module 'attn' to train whole"),
        ("lora.modules_to_save=[drop]", "no module 'drop' to train whole"),
        ("lora.modules_to_save=[c_attn]", "attn.c_attn is both in targets and in modules_to_save"),
        ('lora.targets=[""]', "no linear or embedding module ''"),
        ("lora.rank=100000000", "100000000 is more than any adapted matrix has rows or columns, at most 128"),
        ("lora={variant: pissa, rank: 33}", "lora.rank: pissa takes 33 directions, transformer.h.0.attn.c_attn has 32"),
        ("lora={variant: pissa, targets: [c_attn, wpe]}", "pissa moves a part of the base into the adapter"),
        ("lora={variant: pissa, targets: [lm_head]}", "pissa moves a part of the base into the adapter"),
        ("run.seed=18446744073709551616", "run.seed: expected a number less than 18446744073709551616"),
        ('run.samples=["\\ud800"]', "is not a YAML value"),
        ("base=" + "x" * 5000, "cannot be read: File name too long"),
        ("base=~nosuchuser/x", "cannot be read"),
        ("run.out=" + "x" * 5000, "cannot be written: File name too long"),
        ('run.out="a\\0b"', "holds a control character"),
    ],
)
def test_a_recipe_that_cannot_work_is_one_line(
    here: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    assert expected in refusal(capfd, "train", write_recipe(tiny_base), override)


def test_half_a_character_in_a_recipe_is_one_line(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text('base: "\\ud800"\n', encoding="utf-8")
    assert "half a character (surrogate) in '\\ud800'" in refusal(capfd, "train", "r.yaml")


def test_an_adapter_never_lies_beside_a_model(here: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_base, here / "base")
    assert "run.out base: holds a full model" in refusal(capfd, "train", write_recipe(here / "base"), "run.out=base")
    (here / "base" / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside the model" in refusal(capfd, "train", write_recipe(here / "base"))


def test_eval_refuses_what_it_cannot_finish_before_it_begins(
    here: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftune.inference.perplexity.nats_by_document", None)
    call = ["eval", "--base", str(tiny_base), "--data", "c.jsonl"]
    (here / "dir").mkdir()
    assert "dir: cannot be written" in refusal(capfd, *call, "--json", "dir")
    assert "no/f: cannot be written" in refusal(capfd, *call, "--json", "no/f")
    assert "adapter nowhere: No such file or directory" in refusal(capfd, *call, "--adapter", "a=nowhere")
    assert "File name too long" in refusal(capfd, *call, "--adapter", "a=" + "x" * 5000)


@pytest.mark.parametrize("name", ["東京 \U0001f600", "$\\frac{a$", "[bold]x[/] it's"])
def test_names_that_people_give_are_names(
    here: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    data = {"train": "c.jsonl", "validation": {name: "c.jsonl"}}
    recipe = write_recipe(tiny_base, data=data, run={"out": f"out/{name}", "precision": "fp32", "samples": ["", name]})
    assert main.run(["train", recipe]) == 0
    error = capfd.readouterr().err
    assert "Warning" not in error and name in error
    assert (here / "out" / name / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert main.run(["eval", "--adapter", f"a=out/{name}", "--data", "c.jsonl"]) == 0


def test_a_stdout_that_cannot_show_a_character_is_no_reason_to_stop(here: Path, tiny_base: Path) -> None:
    command = [sys.executable, "-m", "peftune", "data", "c.jsonl", "--base", str(tiny_base)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(main.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"?a dog ran to my log" in done.stdout and not done.stderr
