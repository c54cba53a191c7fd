"""A folder of texts as training material: what is told, what is used, and what a resumed run may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peftune.config.recipe import Recipe
from peftune.errors import UserError
from peftune.training.inputs import read_inputs
from peftune.training.run import train

Make = Callable[..., Recipe]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """Two stories of two paragraphs each, a copy of the first, a blank file and a photo."""
    folder = tmp_path / "my stories"
    folder.mkdir()
    for name, text in (("a", "the cat\n\nsat"), ("b", "the dog\n\nran"), ("c", "the cat\n\nsat"), ("d", "\n \n")):
        (folder / f"{name}.txt").write_text(text)
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\0")
    return folder


def test_a_training_says_how_it_reads_its_texts_and_what_it_leaves_out(
    recipe: Make, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held.txt").write_text("one\n\ntwo")
    given = [f"data.train={stories}", f"data.validation={tmp_path / 'held.txt'}", "optim.steps=1"]
    with pytest.raises(UserError, match=r"1 of 5 files are neither text nor data: photo\.jpg; .* unknown_files: skip"):
        train(recipe(*given))
    train(recipe(*given, "data.unknown_files=skip", "data.repeats=drop"))
    said = capsys.readouterr().err
    for line in (
        f"train: {stories}: 4 files, 3 documents (1 blank, left out), one for each file; "
        "data.split_on: blank-line would make 6",
        f"train: {stories}: left out, neither text nor data: photo.jpg",
        "train: 1 of 3 documents repeat another and are dropped (data.repeats)",
        f"validation: {tmp_path / 'held.txt'}: 1 document, one for each file; data.split_on: blank-line would make 2",
    ):
        assert f"{line}\n" in said
    assert "validation: 0 of 1" not in said


def test_rows_are_read_without_a_word(recipe: Make) -> None:
    assert read_inputs(recipe()).corpus.notes == ()


@pytest.mark.parametrize("repeats", ["keep", "drop"])
def test_repeats_are_dropped_over_all_sources_before_anything_is_held_out(
    repeats: str, recipe: Make, tmp_path: Path
) -> None:
    for name, numbers in (("a", range(10)), ("b", range(5, 15))):
        rows = [{"text": f"text {number}"} for number in numbers for _ in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.jsonl").write_text('{"text": "held"}\n' * 3)
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    corpus = read_inputs(recipe(f"data.train={sources}", "data.validation=0.3", f"data.repeats={repeats}")).corpus
    used = [*corpus.train.documents, *corpus.domains["validation"].documents]
    assert len(used) == (15 if repeats == "drop" else 40)
    kept = [int(corpus.train.store.digests[document]) for document in used]
    assert len(set(kept)) == 15
    held = [f"data.train={sources}", f"data.validation={tmp_path / 'held.jsonl'}", f"data.repeats={repeats}"]
    assert len(read_inputs(recipe(*held)).corpus.domains["validation"].documents) == (1 if repeats == "drop" else 3)


def test_a_run_goes_on_under_another_rule_only_where_it_makes_the_same_documents(
    recipe: Make, tmp_path: Path, train_without_delivery: Callable[[Recipe], Path]
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the cat\n\n\nsat on\n\n\na mat")
    given = [f"data.train={tmp_path}/*.txt", "run.save_every=1"]
    train_without_delivery(recipe(*given, "data.split_on=wide-gap"))
    for other in ("auto", "file"):
        with pytest.raises(UserError, match=r"another recipe: .*fingerprint of data train was "):
            train(recipe(*given, f"data.split_on={other}"))
    with pytest.raises(UserError, match=r"another recipe: .*data.repeats was keep, is drop"):
        train(recipe(*given, "data.split_on=wide-gap", "data.repeats=drop"))
    assert train(recipe(*given, "data.split_on=blank-line", "data.unknown_files=skip")).step == 3
