"""Faults planted in a clean corpus: each is found at its place and nowhere else, and clean corpora raise none."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from peftune.config.data_section import DataSection, Source
from peftune.data.documents import Document
from peftune.data.lint.finding import Finding
from peftune.data.summary import summarize
from peftune.files import json_text
from peftune.model.base import open_base

Rows = list[dict[str, Any]]
Planted = Callable[[Rows], object]
Lint = Callable[[list[Document]], list[Finding]]
WORDS = (Path(__file__).parents[3] / "LICENSE").read_text("utf-8").split()


def prose(seed: int, words: int = 50) -> str:
    """Text without a fault, another one for each seed."""
    plain = [word for word in WORDS if word.isalpha()]
    return " ".join(random.Random(seed).choices(plain, k=words))


def clean_rows(count: int = 40, seed: int = 0) -> Rows:
    return [{"prompt": f"{prose(seed + n, 6)}?", "completion": prose(seed + n + 500)} for n in range(count)]


def written(path: Path, rows: Rows) -> Source:
    path.write_text("".join(json_text(row).replace("\n", " ") + "\n" for row in rows), "utf-8")
    return Source(path=str(path))


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    return open_base("builtin:small").tokenizer


def found(sources: list[Source], tokenizer: PreTrainedTokenizerFast, **options: Any) -> dict[str, str]:
    """The places of each finding."""
    report = summarize(DataSection(train=sources, **options), tokenizer, "t", 512)
    return {one["what"]: one["first"] for one in report["findings"] if one["what"] != "very few documents"}


def completion(text: str) -> Planted:
    return lambda rows: rows[6].update(completion=text)


MOJIBAKE = "café €5 é".encode().decode("cp1252")
PLANTED: dict[str, tuple[Planted, str]] = {
    "prompt space": (lambda rows: rows[6].update(prompt="Why? "), "prompt ends in white space"),
    "blank prompt": (lambda rows: rows[6].update(prompt=" "), "prompt is blank"),
    "blank": (completion(" \n"), "rows with no scored text"),
    "completion space": (completion("A good text. "), "completion ends in white space"),
    "mojibake": (completion(MOJIBAKE), "UTF-8 that was read as"),
    "mojibake of Cyrillic": (completion("Привет".encode().decode("latin-1")), "UTF-8 that was read as"),
    "replacement": (completion("a \ufffd b"), "replacement character"),
    "control": (completion("a\x07b"), "control characters"),
    "C1 control": (completion("a\x9bb"), "control characters"),
    "{{": (completion("Dear {{name, welcome"), "template"),
    "{%": (completion("Dear {% if name, welcome"), "template"),
    "{% if %}": (completion("Dear {% if name %}you {{ name }}, welcome"), "template"),
    "[INST]": (completion("[INST] Do it [/INST]"), "what looks like a control token"),
    "im_start": (completion("<|im_start|>user Hi"), "what looks like a control token"),
    "<|title|>": (completion("<|title|> The sea"), "what looks like a control token"),
    "end of text": (completion("a text<|endoftext|>"), "<|endoftext|> inside a text"),
    "AWS": (completion("use AKIAIOSFODNN7ABCDEFG"), "what looks like a credential"),
    "private key": (completion("-----BEGIN OPENSSH PRIVATE KEY-----\nb3"), "what looks like a credential"),
    "GitHub": (completion(f"{prose(3)} ghp_{'aB3' * 12}"), "what looks like a credential"),
    "sk": (completion(f"{prose(3)} sk-proj-{'aB3' * 12}"), "what looks like a credential"),
    "URL": (completion("postgres://admin:s3cr3t@db.host/x"), "what looks like a credential"),
    "e-mail": (completion("write to jane.doe@company.com today"), "e-mail addresses"),
    "binary": (completion(base64.b64encode(random.Random(1).randbytes(300)).decode()), "text that breaks into"),
    "language": (completion("Это длинный текст на русском языке, и он попал сюда случайно." * 2), "text that breaks"),
    "long": (completion(prose(9, 900)), "prompt and completion over a block"),
    "repeat": (lambda rows: rows[6].update(rows[3]), "repeats of another document"),
    "near": (
        lambda rows: rows[6].update(prompt=rows[3]["prompt"], completion=f"{rows[3]['completion']} Yes."),
        "nearly another document",
    ),
}


@pytest.mark.parametrize(("plant", "what"), PLANTED.values(), ids=PLANTED)
def test_what_is_planted_is_found_at_its_place_and_nothing_else(
    plant: Planted, what: str, tmp_path: Path, small: PreTrainedTokenizerFast
) -> None:
    rows = clean_rows()
    plant(rows)
    [(said, first)] = found([written(tmp_path / "t.jsonl", rows)], small).items()
    assert said.startswith(what) and first == f"{tmp_path / 't.jsonl'}:7"


def test_the_first_three_places_are_told(tmp_path: Path, small: PreTrainedTokenizerFast) -> None:
    rows = clean_rows()
    for number in (2, 4, 6, 8):
        rows[number]["prompt"] += " "
    [first] = found([source := written(tmp_path / "t.jsonl", rows)], small).values()
    assert first == ", ".join(f"{source.path}:{line}" for line in (3, 5, 7))


@pytest.mark.parametrize("words", [12, 20])
def test_a_passage_of_the_training_text_in_another_source_is_found(
    words: int, tmp_path: Path, small: PreTrainedTokenizerFast
) -> None:
    train, held = clean_rows(), clean_rows(20, seed=5000)
    passage = " ".join(train[8]["completion"].split()[10 : 10 + words])
    held[4]["completion"] = f"{prose(1, 20)} {passage} {prose(2, 20)}"
    sources = [written(tmp_path / "t.jsonl", train), written(tmp_path / "v.jsonl", held)]
    expected = {f"{sources[1].path}: documents with long passages of the training text": f"{sources[1].path}:5"}
    assert found(sources, small) == (expected if words >= 13 else {})


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        (b"one\n\ntwo\r\n\r\nthree", "files with mixed line ends", 3),
        (b"one\n<|endoftext|>\n<|endoftext|>\ntwo<|endoftext|>", "<|endoftext|> doubled", 2),
    ],
)
def test_faults_of_text_files_are_found(
    content: bytes, what: str, line: int, tmp_path: Path, small: PreTrainedTokenizerFast
) -> None:
    (path := tmp_path / "a.txt").write_bytes(content)
    assert found([Source(path=str(path))], small) == {what: f"{path}:{line}"}


def test_a_short_speech_may_be_said_twice_and_a_long_one_is_a_repeat(
    tmp_path: Path, small: PreTrainedTokenizerFast
) -> None:
    short, long = "ABRAHAM:\nDo you bite your thumb at us, sir?", f"SAMSON:\n{prose(4, 12)}"
    (path := tmp_path / "play.txt").write_text("\n\n".join([short, prose(1), short, long, prose(2), long]))
    assert found([Source(path=str(path))], small) == {"repeats of another document": f"{path}:14"}


def test_a_file_without_an_end_of_text_beside_others_is_found(tmp_path: Path, small: PreTrainedTokenizerFast) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"one {name}<|endoftext|>two {name}")
    (tmp_path / "c.txt").write_text("three\n\nfour")
    [(what, first)] = found([Source(path=str(tmp_path))], small).items()
    assert what.startswith("files without <|endoftext|>") and first == f"{tmp_path}/c.txt:1"


@pytest.mark.parametrize("domain", ["docs", "unicode"])
def test_built_in_corpora_raise_no_alarm(domain: str, small: PreTrainedTokenizerFast) -> None:
    sources = [Source(path=f"builtin:{domain}/{part}") for part in ("train", "heldout")]
    assert set(found(sources, small)) <= {"nearly another document"}  # pages of the reference quote each other


GOOD = (
    "Ã la carte, “MANHÔ, SÃO PAULO\f", "É”", "f'{{{x}}}' and {{name}} {{'a': 1}}", r"\frac{{\bf a}}{b}",
    "{% if a %}{{ a }}{%- endif %} <| x |> [inst] a|>b<|c", "x <|y", "100 {% of them %}",
    "a@b, x @ y, self@weight, me@example.com", "task-force, sk-learn-is-a-library-of-models", "http://host:80/a@b",
    "AKIA", "naïve café\tœuvre €5\u00a0%", "日本語のテキスト。",
)  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_good_text_raises_no_alarm(lint: Lint, text: str) -> None:
    assert lint([Document(text)]) == []


HOSTILE = ("{{a", "{{ ", "{{", "[INST]", "<|im_", "://a:", "://", "@a.", "a@a.", "sk-", "sk-a", "gh", "Ã ",
           "ÐÑ", "â", "AKIA", "\x00", "-----BEGIN ", "PRIVATE KEY", "\r", "eyJ")  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_linear_time(lint: Lint, piece: str) -> None:
    text = piece * (500_000 // len(piece))
    began = time.process_time()
    lint([Document(text), Document(text + "PRIVATE KEY gh")])
    assert time.process_time() - began < 5
