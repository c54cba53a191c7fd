"""Prompts from the command line and from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftune.cli.writing.generate import gather
from peftune.errors import UserError


def test_a_text_file_holds_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffthe sea \r\n\r\n  café\u2028x\r\nlast".encode())
    assert gather(["first"], file) == ["first", "the sea ", "  café\u2028x", "last"]


def test_a_jsonl_file_holds_prompts_with_line_feeds_and_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\nb", "id": 1}\r\n\r\n{"prompt": ""}\r\n')
    assert gather([], file) == ["a\nb", ""]


def test_a_csv_file_holds_a_prompt_column(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('id,prompt\n1,"a, b"\n', encoding="utf-8")
    assert gather([], file) == ["a, b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "a.jsonl:2: no prompt"),
        ("a.jsonl", b'{"prompt": 3}\n', "a.jsonl:1: prompt is a number"),
        ("a.jsonl", b'{"prompt": \n', "a.jsonl:1: not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: expected an object"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "prompt 1: not valid UTF-8 at character 1"),
        ("a.txt", b"ok\n\xff\n", "not UTF-8 at byte 3"),
        ("a.txt", b" \n\n", "holds no prompt"),
    ],
)
def test_a_file_at_fault_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        gather([], file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        gather([], tmp_path / name)


def test_no_prompt_at_all_is_refused_but_an_empty_one_is_not() -> None:
    with pytest.raises(UserError, match="no prompt; give --prompt"):
        gather([], None)
    assert gather([""], None) == [""]


def test_an_argument_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UserError, match="prompt 2: not valid UTF-8 at character 2"):
        gather(["a", "b\udcff"], None)
