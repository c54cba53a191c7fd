"""Text files read as a stream: decoding, line ends, and where one document ends and the next begins.

A file may be larger than memory; what must fit is one document. How a file is split (`split_on`):

| value        | a document is                                                                               |
|--------------|---------------------------------------------------------------------------------------------|
| `endoftext`  | what stands between two `<|endoftext|>`                                                       |
| `blank-line` | lines that follow each other without a blank line (a blank line holds white space at most)    |
| `line`       | a line that is not blank                                                                      |
| `file`       | all of the file                                                                              |
| `wide-gap`   | lines without two blank lines or more between them                                            |
| `auto`       | `endoftext` if the file has one; else `file` where it is one of several text files; else      |
|              | `wide-gap`, if at least one in 20 of the gaps between text is that wide (a stray one is no    |
|              | rule); else `blank-line`                                                                     |

Line ends become LF, a byte order mark is removed, and a document loses its first and last line feeds, nothing else.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from peftune.data.documents import ReadStats
from peftune.data.sources.decode import open_text

END_OF_TEXT = "<|endoftext|>"

_WIDE_SHARE = 20  # `auto`: one gap in so many must be wide for wide gaps to be what separates documents
_CHUNK = 1 << 20  # characters read at a time
_BLANK_LINE = r"(?:[^\S\n]*\n)"
_GAP = re.compile(rf"\n{_BLANK_LINE}+")
_SEPARATOR = re.compile(re.escape(END_OF_TEXT))
Cut = tuple[str, dict[str, int]]
"""The rule by which a file is cut, and how many documents each rule would make of it, as far as that was counted."""


def split_text(
    path: Path, rule: str, stats: ReadStats | None = None, encoding: str | None = None
) -> Iterator[tuple[int, str]]:
    """Documents of a text file as (line on which it begins, text); blank documents are left out.

    `rule` is any but `auto` (`how_to_split` says which). Raises UserError for a file that cannot be read or decoded,
    with the offset of the first bad byte.
    """
    with open_text(path, stats=stats, encoding=encoding) as file:
        if rule == "endoftext":
            found = _between(file, _SEPARATOR, END_OF_TEXT, _before_half_separator)
        elif rule in ("blank-line", "wide-gap"):
            blank_lines = 2 if rule == "wide-gap" else 1
            gap = re.compile(rf"\n{_BLANK_LINE}{{{blank_lines},}}")
            found = _between(file, gap, "\n" * (1 + blank_lines), _before_trailing_space)
        elif rule == "line":
            found = enumerate(file, start=1)
        else:
            found = iter([(1, file.read())])
        empty = 0  # line of an end of text that another follows
        for number, (line, text) in enumerate(found):
            if empty and stats is not None:
                stats.faults["end-doubled"].add(f"{path}:{empty}")
            empty = line if number and rule == "endoftext" and not text.strip() else 0
            if text.strip():
                leading = len(text) - len(text.lstrip("\n")) if text[0] == "\n" else 0
                yield line + leading, text.strip("\n")


def unix_line_ends(text: str) -> str:
    """`text` with CRLF and lone CR turned into LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _chunks(file: io.TextIOWrapper) -> Iterator[str]:
    yield from iter(lambda: file.read(_CHUNK), "")


def how_to_split(path: Path, several: bool, encoding: str | None = None) -> Cut:
    """What `auto` means for this file, one of `several` text files or the only one."""
    gaps = wide = 0
    rest = tail = ""
    started = False
    with open_text(path, encoding=encoding) as file:
        for chunk in _chunks(file):
            tail += chunk
            if END_OF_TEXT in tail:
                return "endoftext", {}
            tail = tail[-len(END_OF_TEXT) :]
            rest += chunk if started else chunk.lstrip()  # blank lines before all text are no gap
            started = started or bool(rest)
            complete = _before_trailing_space(rest, chunk)
            found = _GAP.findall(rest, 0, complete)
            gaps += len(found)
            wide += sum(gap.count("\n") > 2 for gap in found)
            rest = rest[complete:]
    if not started:
        return "file", {}
    made = {"file": 1, "wide-gap": wide + 1, "blank-line": gaps + 1}
    rule = "file" if several else "wide-gap" if wide and wide * _WIDE_SHARE >= gaps else "blank-line"
    return rule, made


def _before_trailing_space(text: str, chunk: str) -> int:
    """Where the text ends whose gaps are complete; only `chunk`, its end, can hold anything but white space."""
    return 0 if chunk.isspace() else len(text.rstrip())


def _before_half_separator(text: str, _: str) -> int:
    """Where the text ends that can hold no first half of a separator; one has a single `<`, its first character."""
    return f"{text}<".index("<", max(0, len(text) - len(END_OF_TEXT) + 1))


def _between(
    file: io.TextIOWrapper, gap: re.Pattern[str], bound: str, complete: Callable[[str, str], int]
) -> Iterator[tuple[int, str]]:
    """What stands between the gaps of a file, with the line on which it begins.

    `complete(text, chunk)` is how much of a text that ends with `chunk` no further text can change. `bound` is a gap
    that is put before the first document and after the last, so that all are alike.
    """
    parts: list[str] = []
    rest = bound
    line = begins = 1 - bound.count("\n")  # the file itself begins on line 1
    for chunk, last in chain(((chunk, False) for chunk in _chunks(file)), [(bound, True)]):
        rest += chunk
        end = len(rest) if last else complete(rest, chunk)
        at = 0
        for found in gap.finditer(rest, 0, end):
            yield begins, "".join([*parts, rest[at : found.start()]])
            line += rest.count("\n", at, found.end())
            parts, begins, at = [], line, found.end()
        parts.append(rest[at:end])
        line += rest.count("\n", at, end)
        rest = rest[end:]
