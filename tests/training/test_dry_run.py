"""A dry run checks what a run checks, writes nothing, and its recipe is the one that runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from peftune.cli import main
from peftune.config.recipe import Recipe, load_recipe
from peftune.errors import UserError
from peftune.training.planning.dry_run import dry_run
from peftune.training.run import train

Make = Callable[..., Recipe]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def file(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file with two domains to evaluate, and much that is auto."""
    corpus = recipe().data.train[0].path
    made = recipe(f"data.validation={{a: {corpus}, b: [{corpus}]}}", "run.precision=auto", "batch.micro_size=auto")
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json") | {"run": {"out": "new/adapter"}}))
    monkeypatch.chdir(tmp_path)
    return path


def test_it_prints_the_recipe_that_runs_and_writes_nothing(file: Path, capfd: Captured) -> None:
    before = sorted(file.parent.rglob("*"))
    assert main.run(["train", str(file), "--dry-run", "lora.rank=3"]) == 0
    out = capfd.readouterr().out
    assert sorted(file.parent.rglob("*")) == before
    Path("resolved.yaml").write_text(out)
    given, resolved = load_recipe(file, ["lora.rank=3"]), load_recipe("resolved.yaml")
    assert resolved.data.block_size == 64 and resolved.batch.micro_size == 8
    assert resolved.run.precision in ("fp32", "bf16") and "auto" not in str(yaml.safe_load(out)["batch"])
    unchanged = {"data": {"block_size"}, "batch": {"micro_size"}, "run": {"precision"}}
    assert resolved.model_dump(exclude=unchanged) == given.model_dump(exclude=unchanged)  # type: ignore[arg-type]
    for words in ("26 documents", "on b: ", "steps: 3 of 8 blocks", "memory of a rank", f"writes {Path.cwd()}/new"):
        assert words in out
    blocks = int(out.partition(" scored tokens in ")[2].split()[0])
    assert blocks % 8 and f"({3 / -(-blocks // 8):.3g} passes)" in out, "a pass ends with a step of fewer blocks"


def test_the_numbers_are_those_of_the_run(recipe: Make) -> None:
    foreseen = dry_run(recipe())
    delivery = train(recipe())
    events = [json.loads(line) for line in (delivery.out / "metrics.jsonl").read_text().splitlines()]
    start, memory = (next(e for e in events if e["event"] == name) for name in ("start", "memory"))
    assert foreseen.trained == start["trainable_parameters"] and foreseen.inputs.total_steps == start["total_steps"]
    assert foreseen.recipe.batch.micro_size == start["micro_size"]
    measured = memory["bytes_per_rank"][0]
    assert measured["gradient"] == foreseen.memory.gradient
    assert measured["parameters"] == foreseen.memory.base + foreseen.memory.adapter


def test_it_says_what_a_run_would_find(
    recipe: Make, file: Path, train_without_delivery: Callable[[Recipe], Path], capfd: Captured
) -> None:
    train_without_delivery(recipe(f"run.out={file.parent / 'cut'}"))
    text = yaml.safe_dump(recipe().model_dump(mode="json"))
    Path("same.yaml").write_text(text)
    cut = ["train", "same.yaml", "--dry-run", f"run.out={file.parent / 'cut'}"]
    assert main.run(cut) == 0 and "goes on from step 3" in capfd.readouterr().out
    train(recipe(f"run.out={file.parent / 'cut'}"))
    assert main.run(cut) == 0 and "nothing would be done" in capfd.readouterr().out
    assert main.run([*cut, "optim.lr=1"]) == 2 and "another recipe" in capfd.readouterr().err


def test_every_problem_is_told_at_once(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": null}\n')
    sources = [f"data.train=[{tmp_path}/none.txt, {tmp_path}/bad.jsonl]", f"data.validation={tmp_path}/absent.txt"]
    with pytest.raises(UserError) as error:
        dry_run(recipe(*sources, "base=./nobase", f"run.out={tmp_path}/file/x", "run.precision=fp16"))
    for words in ("fp16 needs a GPU", "run.out", "./nobase", "none.txt", "bad.jsonl", "absent.txt"):
        assert str(error.value).count(words) >= 1, words


def test_a_recipe_with_a_wrong_key_still_tells_of_files_that_are_missing(file: Path, capfd: Captured) -> None:
    gone = ["data.train=[none.txt, builtin:docs/train]", "data.validation={a: absent.txt}"]
    for verb in (["train"], ["launch", "cpu"]):
        assert main.run([*verb, str(file), "--dry-run", "optim.lrr=1", "data.blocksize=8", *gone]) == 2
        said = capfd.readouterr().err
        for words in (
            "unknown key optim.lrr",
            "unknown key data.blocksize",
            "none.txt: no such",
            "absent.txt: no such",
        ):
            assert said.count(words) == 1, words
    assert main.run(["train", str(file), "--dry-run", "data=3"]) == 2


def test_a_launch_foresees_the_memory_of_its_ranks(file: Path, capfd: Captured) -> None:
    said = {}
    for config in ("cpu", "cpu-2", "cpu-2-zero2"):
        assert main.run(["launch", config, str(file), "--dry-run"]) == 0
        said[config] = capfd.readouterr().out
    assert "1 process" in said["cpu"] and "2 ranks, DDP" in said["cpu-2"] and "2 ranks, ZeRO-2" in said["cpu-2-zero2"]
    assert main.run(["launch", "cpu-2-zero3", str(file), "--dry-run", "lora.variant=dora"]) == 2
    assert "ZeRO-3 cannot be combined with lora.variant" in capfd.readouterr().err
