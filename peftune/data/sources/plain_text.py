"""Text files read as a stream: decoding, line ends, and where one document ends and the next begins.

A file may be larger than memory; what must fit is one document. How a file is split (`split_on`):

| value        | a document is                                                                               |
|--------------|---------------------------------------------------------------------------------------------|
| `endoftext`  | what stands between two `<|endoftext|>`                                                       |
| `blank-line` | lines that follow each other without a blank line (a blank line holds white space at most)    |
| `line`       | a line that is not blank                                                                      |
| `file`       | all of the file                                                                              |
| `auto`       | `endoftext` if the file has one; else cut at two or more blank lines, if at least one in 20   |
|              | of the gaps between text is that wide (a stray one is no rule); else `blank-line`             |

Line ends become LF, a byte order mark is removed, and a document loses its first and last line feeds, nothing else.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

from peftune.data.documents import ReadStats
from peftune.errors import UserError

END_OF_TEXT = "<|endoftext|>"

_WIDE_SHARE = 20  # `auto`: one gap in so many must be wide for wide gaps to be what separates documents
_CHUNK = 1 << 20  # characters read at a time
_BLANK_LINE = r"(?:[^\S\n]*\n)"
_GAP = re.compile(rf"\n{_BLANK_LINE}+")
_SEPARATOR = re.compile(re.escape(END_OF_TEXT))
_MARKS = (  # the longer mark first: UTF-32-LE begins like UTF-16-LE
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def split_text(path: Path, split_on: str, stats: ReadStats | None = None) -> Iterator[tuple[int, str]]:
    """Documents of a text file as (line on which it begins, text); blank documents are left out.

    Raises UserError for a file that cannot be read or decoded, with the offset of the first bad byte.
    """
    blank_lines = 1
    if split_on == "auto":
        split_on, blank_lines = _how_to_split(path)
    with open_text(path, stats=stats) as file:
        if split_on == "endoftext":
            found = _between(file, _SEPARATOR, END_OF_TEXT, _before_half_separator)
        elif split_on == "blank-line":
            gap = re.compile(rf"\n{_BLANK_LINE}{{{blank_lines},}}")
            found = _between(file, gap, "\n" * (1 + blank_lines), _before_trailing_space)
        elif split_on == "line":
            found = enumerate(file, start=1)
        else:
            found = iter([(1, file.read())])
        for line, text in found:
            if text.strip():
                leading = len(text) - len(text.lstrip("\n")) if text[0] == "\n" else 0
                yield line + leading, text.strip("\n")


@contextmanager
def open_text(path: Path, newline: str | None = None, stats: ReadStats | None = None) -> Iterator[io.TextIOWrapper]:
    """A strict text stream over UTF-8, or the UTF-16 or UTF-32 that a byte order mark announces.

    `newline` is that of `open`: None turns every line end into LF. Inside the `with`, failures to read or to
    decode become UserErrors, and `stats` knows how far the stream has come.
    """
    encoding, mark = "utf-8", b""
    try:
        with open(path, "rb") as raw:
            head = raw.read(4)
            mark, encoding = next((found for found in _MARKS if head.startswith(found[0])), (mark, encoding))
            raw.seek(len(mark))
            try:
                with stats.reading(raw) if stats else nullcontext():
                    yield io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline=newline)
            except UnicodeDecodeError as error:
                offset = raw.tell() - len(error.object) + error.start  # `object` is the last that was read
                raise UserError(f"{path}: not {encoding.upper()} at byte {offset}; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def unix_line_ends(text: str) -> str:
    """`text` with CRLF and lone CR turned into LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _chunks(file: io.TextIOWrapper) -> Iterator[str]:
    yield from iter(lambda: file.read(_CHUNK), "")


def _how_to_split(path: Path) -> tuple[str, int]:
    """What `auto` means for this file: (`endoftext` or `blank-line`, blank lines that end a document)."""
    gaps = wide = 0
    rest = tail = ""
    started = False
    with open_text(path) as file:
        for chunk in _chunks(file):
            tail += chunk
            if END_OF_TEXT in tail:
                return "endoftext", 0
            tail = tail[-len(END_OF_TEXT) :]
            rest += chunk if started else chunk.lstrip()  # blank lines before all text are no gap
            started = started or bool(rest)
            complete = _before_trailing_space(rest, chunk)
            found = _GAP.findall(rest, 0, complete)
            gaps += len(found)
            wide += sum(gap.count("\n") > 2 for gap in found)
            rest = rest[complete:]
    return "blank-line", 2 if wide and wide * _WIDE_SHARE >= gaps else 1


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


def looks_like_text(path: Path) -> bool:
    """Whether a file found in a directory is meant to be read: no NUL in its first 4 KiB, or a byte order mark."""
    with open(path, "rb") as raw:
        head = raw.read(4096)
    return b"\0" not in head or head.startswith(tuple(mark for mark, _ in _MARKS))
