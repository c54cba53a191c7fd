"""From a test set to scores, by the commands that a person types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftune.cli.main import run
from peftune.config.data_section import Source
from peftune.data.references import read_items
from peftune.inference.generate import generate
from peftune.inference.settings import GenerationSettings

pytest.importorskip("sacrebleu", reason="the extra `score` is not installed")
COLUMNS = ["--column", "prompt=mr", "--column", "completion=ref"]


@pytest.fixture
def test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three items in five rows, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    rows = [
        "mr\tref",
        "the cat\tsat on the mat",
        "a dog\tsat on the log",
        "the cat\tsat there",
        "the mat\tis flat",
        "a dog\tsat",
    ]
    (tmp_path / "test.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path / "test.tsv"


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line.removeprefix("peftune: ")


def test_a_test_set_is_written_in_order_and_scored(
    base: Path, test_set: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    greedy = ["--base", str(base), "--temperature", "0", "--max-new-tokens", "8"]
    call = ["generate", "--test-set", "test.tsv", *COLUMNS, *greedy]
    assert run([*call, "--out", "h.jsonl", "--out", "h.txt", "--json", "g.json"]) == 0
    assert capfd.readouterr().out == ""
    wanted = generate(["the cat", "a dog", "the mat"], str(base), None, GenerationSettings(8, 0.0))
    rows = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat", "a dog", "the mat"]
    assert [row["hypothesis"] for row in rows] == [generation.text.strip() for generation in wanted]
    assert [len(row["references"]) for row in rows] == [2, 2, 1]
    lines = (tmp_path / "h.txt").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "g.json").read_text(encoding="utf-8"))["generations"][0]["text"] == wanted[0].text
    assert run(call) == 0
    assert capfd.readouterr().out == lines
    assert run(["score", "a=h.jsonl", "b=h.txt", "--json", "s.json"]) == 0
    shown = capfd.readouterr().out
    assert "3 items, 5 references" in " ".join(shown.split()) and "ROUGE-L" in shown
    found = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert (found["items"], found["references"], list(found["systems"])) == (3, 5, ["a", "b"])
    assert found["systems"]["b"]["NIST"]["against"] == {"score": 0.0, "interval": [0.0, 0.0]}
    assert run(["score", "h.txt", "--references", "test.tsv", *COLUMNS, "--json", "t.json"]) == 0
    of_text = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["systems"]["h"]
    assert of_text == found["systems"]["a"]


def test_prompts_without_references_are_written_too(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "--base", str(base), "--prompt", "the", "--prompt", "a", "--temperature", "0"]
    assert run([*call, "--max-new-tokens", "4", "--out", str(tmp_path / "h.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["references"]) for row in rows] == [("the", []), ("a", [])]
    assert "h.jsonl: holds no references; give --references" in refusal(capfd, "score", str(tmp_path / "h.jsonl"))


def test_a_conversation_s_answer_ends_where_the_next_turn_begins(base: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": turns}))
    assert read_items(Source(path=str(tmp_path / "c.jsonl")))[0].is_chat
    call = ["generate", "--base", str(base), "--test-set", str(tmp_path / "c.jsonl"), "--max-new-tokens", "4"]
    assert run([*call, "--json", str(tmp_path / "g.json"), "--stop", "zzz"]) == 0
    stop = json.loads((tmp_path / "g.json").read_text(encoding="utf-8"))["settings"]["stop"]
    assert stop == ["zzz", "\n\nSystem:", "\n\nUser:", "\n\nAssistant:"]


def test_what_does_not_fit_together_is_refused_before_the_work(
    base: Path, test_set: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    generating = ["generate", "--base", str(base), "--test-set", "test.tsv"]
    assert "test.tsv: no column 'text'; found mr, ref" in refusal(capfd, *generating)
    assert "no/h.txt: cannot be written" in refusal(capfd, *generating, *COLUMNS, "--out", "no/h.txt")
    assert "--test-set has prompts of its own" in refusal(capfd, *generating, "--prompt", "a")
    assert "--column names columns of --test-set" in refusal(capfd, *generating[:3], "--prompt", "a", *COLUMNS)
    assert "drop other prompts" in refusal(capfd, *generating, "--interactive")
    Path("h.txt").write_text("one\ntwo\n")
    against = ["score", "h.txt", "--references", "test.tsv", *COLUMNS]
    assert refusal(capfd, *against) == (
        "h.txt: 2 texts, and test.tsv has 3 items; expected one text for each, in this order"
    )
    Path("h.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "hypothesis": "x", "references": ["y"]}) + "\n" for p in "abc")
    )
    assert "h.jsonl: prompt 1 is 'a', in test.tsv it is 'the cat'" in refusal(capfd, "score", "h.jsonl", *against[2:])
    assert "--column names columns of --references" in refusal(capfd, "score", "h.jsonl", *COLUMNS)
    assert "nowhere.txt: cannot be read" in refusal(capfd, "score", "nowhere.txt")
    assert "FILE: h is given twice" in refusal(capfd, "score", "h.txt", "h.jsonl")
