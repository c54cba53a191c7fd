"""`data.lint`: grave faults are told at the start of a run, refused together, or not looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peftune.config.recipe import Recipe
from peftune.errors import UserError
from peftune.training.inputs import read_inputs

Make = Callable[..., Recipe]


def test_faults_are_told_refused_or_left_alone(recipe: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"The {number} cats sat on the mat."} for number in range(20)]
    rows[3]["text"] += " caf\u00c3\u00a9"
    rows[5]["text"] += " jane@company.com"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = f"data.train={path}", "data.validation=0.2"
    for _ in range(2):  # read anew, and from the cache
        [note] = read_inputs(recipe(*settings)).notes()
        assert note.startswith("UTF-8 that was read as") and f"1 document, first {path}:4: " in note
    assert list(read_inputs(recipe(*settings, "data.lint=off")).notes()) == []
    with pytest.raises(UserError, match=rf"\(1\) UTF-8.*{path}:4.*\(2\) e-mail addresses.*{path}:6") as refused:
        read_inputs(recipe(*settings, "data.lint=strict"))
    assert refused.value.exit_code == 2


def test_passages_of_the_training_text_in_validation_are_told(recipe: Make, tmp_path: Path) -> None:
    train, held = tmp_path / "train.txt", tmp_path / "held.txt"
    passage = "a grey cat went over the old bridge to look at seven ships in the harbour"
    train.write_text("\n\n".join([*(f"text {number} of the many" for number in range(20)), f"Once {passage} again."]))
    held.write_text(f"Something new.\n\nThey say that {passage}, but who knows?")
    settings = f"data.train={train}", f"data.validation={held}", "data.split_on=blank-line"
    [note] = [one for one in read_inputs(recipe(*settings)).notes() if "passages" in one]
    assert note.startswith("validation: documents with long passages of the training text: 1 document,")
    assert f"first {held}:3: its figures are better" in note
