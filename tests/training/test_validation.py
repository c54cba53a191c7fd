"""What a run validates on, and what it says where that is nothing, or no held-out text, or never gets better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peftune.cli import main
from peftune.config.recipe import Recipe
from peftune.errors import CheckFailed, UserError
from peftune.training.run import train

Make = Callable[..., Recipe]


def rising(tmp_path: Path) -> tuple[str, ...]:
    """Settings of a run whose validation text, of another kind, only becomes less likely."""
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{number}%;" for number in range(30, 300)))
    return f"data.validation={other}", "optim.lr=0.1", "optim.steps=6", "run.eval_every=2"


def test_early_stopping_does_not_deliver_the_adapter_that_changes_nothing(recipe: Make, tmp_path: Path) -> None:
    made = recipe(*rising(tmp_path), "run.early_stopping=2")
    better = r"better than the base's.*try a lower optim.lr.*early_stopping=null goes on to .* of step 6"
    with pytest.raises(CheckFailed, match=better):
        train(made)
    assert not (Path(made.run.out) / "adapter_config.json").exists()
    assert train(recipe(*rising(tmp_path))).step == 6  # as the message says


def test_a_rate_too_low_is_not_called_too_high(recipe: Make, tmp_path: Path) -> None:
    other = rising(tmp_path)[0]
    with pytest.raises(CheckFailed, match=r"is not delivered\..*try a higher optim\.lr"):
        train(recipe(other, "optim.lr=1e-20", "optim.steps=1", "run.eval_every=1", "run.early_stopping=1"))


def test_a_fraction_that_holds_out_nothing_is_told_and_refused_for_early_stopping(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    equal = tmp_path / "equal.txt"
    equal.write_text("\n\n".join(["the cat sat on a mat"] * 5))
    settings = f"data.train={equal}", "data.validation=0.05", "optim.steps=1"
    train(recipe(*settings))
    said = capsys.readouterr().err
    assert "data.validation 0.05 holds out nothing" in said and "validation: none" in said
    with pytest.raises(UserError, match=r"holds out nothing.*\(5 in all\).*name files in data.validation"):
        train(recipe(*settings, "run.early_stopping=2", "run.eval_every=1", f"run.out={tmp_path / 'other'}"))


def test_validation_documents_that_are_trained_on_are_counted_with_the_first_place(
    recipe: Make, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    held = tmp_path / "held.txt"
    held.write_text("\n\n".join(["one new text", texts[3], "another new text", texts[5]]))
    made = recipe(f"data.validation={{mixed: {held}, leak: {corpus}}}", "optim.steps=1")
    train(made)
    said = capsys.readouterr().err
    assert "validation mixed (4 documents) holds documents that are trained on too: 2 documents, first " in said
    assert f"first {held}:3, {held}:7: its figures are better" in said
    assert "validation leak (26 documents) holds documents that are trained on too: 26 documents" in said
    provenance = json.loads((Path(made.run.out) / "peftune.json").read_text())
    assert provenance["validation_also_trained_on"] == {"mixed": 2, "leak": 26}
    card = (Path(made.run.out) / "README.md").read_text()
    assert "held-out" not in card and "26 documents of leak were trained on too." in card


def test_the_first_line_says_how_much_of_the_text_the_run_sees(
    recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe("optim.steps=1", "batch.global_size=2", "batch.micro_size=2", "data.validation=0.2"))
    first = capsys.readouterr().err.splitlines()[0]
    assert "1 step of 2 blocks (2 a forward): 2 of the " in first and " blocks, 0.1" in first and " passes; " in first
    assert " passes; validation: " in first and first.endswith(" tokens")


def test_an_evaluation_on_training_text_says_that_it_is_not_held_out(
    recipe: Make,
    corpus: Path,
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = recipe("data.validation=0.3", "optim.steps=1")
    held_out = train(made).metrics["validation"]["base"]["tokens"]
    monkeypatch.chdir(tmp_path)
    new = tmp_path / "new.txt"
    new.write_text("no text that anything was trained on\n\nnor this")
    command = ["eval", "--base", str(tiny_base), "--adapter", f"a={made.run.out}"]
    assert main.run([*command, "--data", f"leak={corpus}", "--data", f"new={new}", "--json", "f.json"]) == 0
    said, found = capsys.readouterr().out, json.loads(Path("f.json").read_text())
    assert "Held-out" not in said and "Perplexity (lower is better)" in said
    known, told = found["trained_on"]["a"]["leak"]
    assert told == 26 and known < 26 and found["domains"]["leak"]["tokens"] > held_out
    assert f"leak is not held out for a: it was trained on {known} of the 26 documents" in said
    assert "new is not held out" not in said and list(found["trained_on"]["a"]) == ["leak"]
