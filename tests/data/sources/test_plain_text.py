"""Where documents begin and end in text files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftune.data.sources import plain_text
from peftune.data.sources.plain_text import how_to_split, split_text
from peftune.errors import UserError

E = "<|endoftext|>"


def located(path: Path, rule: str = "auto", several: bool = False) -> list[tuple[int, str]]:
    return list(split_text(path, how_to_split(path, several)[0] if rule == "auto" else rule))


def split(path: Path, rule: str = "auto", several: bool = False) -> list[str]:
    return [text for _, text in located(path, rule, several)]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        (f"a\n\nb{E}c", ["a\n\nb", "c"]),
        (f"{E}\na\n{E}{E}\n", ["a"]),
        ("a\nb\n\nc\n\n\nd", ["a\nb\n\nc", "d"]),
        ("a\nb\n\nc\n", ["a\nb", "c"]),
        ("a\n\nb\n\n\n\n", ["a", "b"]),  # blank lines at the ends do not decide
        ("\n\n\na\n\nb", ["a", "b"]),
        ("a\n \t\nb\n", ["a", "b"]),  # white space only is blank
        ("a\n \n\t\nb\n\nc", ["a", "b\n\nc"]),
        ("  a\nb  \n", ["  a\nb  "]),
        ("", []),
        (" \n\n ", []),
        ("a", ["a"]),
    ],
)
def test_auto_takes_the_strongest_separator_that_the_file_has(text, documents, write):
    assert split(write("a.txt", text)) == documents


@pytest.mark.parametrize(
    ("split_on", "documents"),
    [
        ("file", [f"a\nb\n\nc\n\n\nd{E}e"]),
        ("line", ["a", "b", "c", f"d{E}e"]),
        ("blank-line", ["a\nb", "c", f"d{E}e"]),
        ("wide-gap", ["a\nb\n\nc", f"d{E}e"]),
        ("endoftext", ["a\nb\n\nc\n\n\nd", "e"]),
    ],
)
def test_split_on_overrides_auto(split_on, documents, write):
    assert split(write("a.md", f"\na\nb\n\nc\n\n\nd{E}e\n"), split_on) == documents


def test_documents_know_their_first_line(write):
    assert located(write("a.txt", f"a\n{E}\n\nb\nc{E}d\n")) == [(1, "a"), (4, "b\nc"), (5, "d")]
    assert located(write("b.txt", "\n\na\n\nb\nc\n\nd")) == [(3, "a"), (5, "b\nc"), (8, "d")]


@given(
    text=st.lists(st.sampled_from(["a", "bb", "\n", "\n\n", " ", E, "<|end", "of", "text|>"]), max_size=30).map("".join)
)
def test_pieces_of_any_size_give_the_same_documents(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        whole = list(split_text(path, "endoftext"))
        patch.setattr(plain_text, "_CHUNK", 5)
        assert list(split_text(path, "endoftext")) == whole
        rule = how_to_split(path, False)[0]
        assert (rule == "endoftext") == (E in text)
    assert [t for _, t in whole] == [part.strip("\n") for part in text.split(E) if part.strip()]


def by_lines(text: str, enough: int) -> list[tuple[int, str]]:
    """Documents between blank lines, as (first line, text), read line by line."""
    found: list[tuple[int, list[str]]] = []
    blank = enough
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            blank += 1
            continue
        if blank >= enough:
            found.append((number, []))
        else:
            found[-1][1].extend(text.split("\n")[number - 1 - blank : number - 1])
        found[-1][1].append(line)
        blank = 0
    return [(number, "\n".join(lines)) for number, lines in found]


def widest_gaps(text: str) -> int:
    """Blank lines that separate documents under `auto`, gap by gap."""
    bodies = by_lines(text, 1)
    lines = text.split("\n")
    gaps = [sum(not line.strip() for line in lines[a - 1 : b - 1]) for (a, _), (b, _) in pairwise(bodies)]
    wide = sum(gap > 1 for gap in gaps)
    return 2 if wide and wide * 20 >= len(gaps) else 1


LINES = st.lists(st.sampled_from(["a", "bb", "\n", "\n\n", "\n\n\n", " ", "\t", "\u00a0", "\x1c"]), max_size=40)


@given(text=LINES.map("".join), piece=st.sampled_from([1, 2, 5, 1 << 20]))
def test_blank_lines_separate_as_line_by_line(tmp_path_factory, text, piece):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "_CHUNK", piece)
        by_rule = {"blank-line": by_lines(text, 1), "wide-gap": by_lines(text, 2)}
        assert {rule: list(split_text(path, rule)) for rule in by_rule} == by_rule
        assert located(path) == by_lines(text, widest_gaps(text))
        counted = how_to_split(path, True)[1]
        assert not counted or counted == {"file": 1} | {rule: len(found) for rule, found in by_rule.items()}


@pytest.mark.parametrize("padding", [0, 1, 5000, 1 << 20, (1 << 20) + 3])
def test_undecodable_bytes_are_named_by_their_offset_in_the_file(padding, write):
    path = write("a.txt", b"\xef\xbb\xbf" + b"x" * padding + b"\xe9t\xe9\n")
    with pytest.raises(UserError, match=rf"a\.txt: not UTF-8 at byte {padding + 3}; save the file as UTF-8"):
        split(path)


def test_a_character_cut_at_the_end_of_the_file_is_named(write):
    with pytest.raises(UserError, match="not UTF-8 at byte 2;"):
        split(write("a.txt", b"ab\xf0\x9f\x99"))
    with pytest.raises(UserError, match="not UTF-16-LE at byte 4;"):
        split(write("b.txt", b"\xff\xfea\0b"))
