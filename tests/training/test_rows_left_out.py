"""Rows of tables in a run: what is skipped is told and recorded, and another choice of rows is another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peftune.config.recipe import Recipe
from peftune.errors import UserError
from peftune.training.inputs import read_inputs
from peftune.training.run import train
from peftune.training.run_directory import refuse_other_run

Make = Callable[..., Recipe]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [{"a": f"text {number}", "b": ["x", "y", "z"][number % 3]} for number in range(30)]
    rows[3]["a"] = rows[4]["a"] = rows[6]["a"] = None  # type: ignore[assignment]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_rows_that_are_left_out_are_told_at_the_start_and_recorded(
    recipe: Make, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{{path: {table}, text: '{{b}}: {{a}}', where: {{b: [x, y]}}}}"
    held = f"{{path: {table}, text: a, where: {{b: y}}}}"
    made = recipe(f"data.train={source}", f"data.validation={held}", "data.on_bad_row=skip", "optim.steps=1")
    train(made)
    said = capsys.readouterr().err
    assert f"skipped rows, nothing in {{a}}: 3 rows, first {table}:4, {table}:5, {table}:7: nothing is" in said
    assert f"skipped rows, column 'a' holds null: 1 row, first {table}:5" in said
    written = json.loads((tmp_path / "adapter" / "peftune.json").read_text())["rows_left_out"]
    skipped = {"nothing in {a}": {"rows": 3, "first": [f"{table}:{line}" for line in (4, 5, 7)]}}
    assert written["train"] == {"rows": 30, "unwanted": 10, "skipped": skipped, "never": []}
    assert written["validation/validation"]["unwanted"] == 20


def test_another_choice_of_rows_is_another_run_and_an_older_record_lacks_the_keys(recipe: Make, table: Path) -> None:
    named = [f"data.train={{path: {table}, text: a, where: {{b: {value}}}}}" for value in ("z", "[z]", "[z, z]")]
    seen = [read_inputs(recipe(name)).identity for name in named]
    refuse_other_run(seen[0], seen[0], "out")
    for other in seen[1:]:
        with pytest.raises(UserError, match=r"data\.train\[0\]\.where\.b"):
            refuse_other_run(seen[0], other, "out")
    now = read_inputs(recipe()).identity
    keys = ("where", "explode", "delimiter", "on_bad_row")
    older = now | {"data.train": [{k: v for k, v in source.items() if k not in keys} for source in now["data.train"]]}
    del older["data.on_bad_row"]
    refuse_other_run(older, now, "out")
