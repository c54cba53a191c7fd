"""Files opened as text: in which encoding, and what is said where the bytes do not fit it."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

from peftune.data.documents import ReadStats
from peftune.errors import UserError, explained

_MARKS = (  # the longer mark first: UTF-32-LE begins like UTF-16-LE
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HEAD = 4096  # bytes by which a file is judged
_CHUNK = 1 << 20
_CONTROLS = re.compile(rb"[\x01-\x08\x0e-\x1f]")
_ALONE = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")
_HIGH = re.compile(rb"[\x80-\xff]")
_GUESSES = (  # codec, letters, and their least share of all that is not ASCII; what fits several is the first of them
    ("utf-8", "", 0.0),
    ("shift_jis", "[\u3041-\u30ff]", 0.2),
    ("euc_jp", "[\u3041-\u30ff]", 0.2),
    ("euc-kr", "[\uac00-\ud7a3]", 0.8),
    ("cp1251", "[\u0430-\u044f]", 0.7),  # in another Cyrillic encoding these are capitals
    ("koi8-r", "[\u0430-\u044f]", 0.7),
    ("gb2312", "[\u4e00-\u9fff]", 0.5),
    ("big5", "[\u4e00-\u9fff]", 0.5),
    ("gb18030", "[\u4e00-\u9fff]", 0.5),
)


class NotDecodable(UserError):
    """A file's bytes are not text in the encoding that it was read in, or not in UTF-8 although none was given.

    `what` names the file, encoding and place; `likely` is another encoding that they may be, with `why`.
    """

    def __init__(self, path: Path, what: str, likely: str = "", why: str = "") -> None:
        self.path, self.what, self.likely = path, what, likely
        self.why = f" ({why})" if why else ""
        super().__init__(f"{path}: {what}; save the file as UTF-8{self.why}")


@contextmanager
def open_text(
    path: Path, newline: str | None = None, stats: ReadStats | None = None, encoding: str | None = None
) -> Iterator[io.TextIOWrapper]:
    """A strict text stream over what a byte order mark announces, else over `encoding` (a codec), else over UTF-8.

    `newline` is that of `open`: None turns every line end into LF. Inside the `with`, failures to read or to
    decode become UserErrors (`NotDecodable`), and `stats` knows how far the stream has come.
    """
    with explained(f"{path}: cannot be read"), open(path, "rb") as raw:
        head = raw.read(_HEAD)
        mark, codec = next((found for found in _MARKS if head.startswith(found[0])), (b"", encoding or "utf-8"))
        wide = "" if mark else _unmarked(head)
        if wide and not codec.startswith(("utf_16", "utf_32")):  # most others would read it, with its NULs
            raise NotDecodable(path, f"looks like {wide.upper()} without a byte order mark", wide)
        if codec in ("utf_16", "utf_32"):  # Python's wants a mark
            codec = wide or f"{codec}_le"
        raw.seek(len(mark))
        try:
            with stats.reading(raw) if stats else nullcontext():
                yield (file := io.TextIOWrapper(raw, encoding=codec, errors="strict", newline=newline))
            if stats and newline is None and isinstance(file.newlines, tuple):
                stats.faults["line-ends"].add(f"{path}:{_other_end(path, codec)}")
        except UnicodeDecodeError as error:
            bad = error.object[error.start : error.start + 1]
            what = f"not {codec.replace('_', '-').upper()} at byte {raw.tell() - len(error.object) + error.start}"
            likely = "" if mark else _likely(error.object)
            why = f"0x{bad.hex()} is {bad.decode(likely)} in {likely}" if likely.startswith("cp") else ""
            raise NotDecodable(path, what, likely, why) from None


def check_decodable(path: Path, encoding: str | None) -> None:
    """NotDecodable for a file that `open_text` could not read to its end."""
    with open_text(path, encoding=encoding) as file:
        while file.read(_CHUNK):
            pass


def looks_like_text(path: Path) -> bool:
    """Whether a file of an unknown kind is text: no NUL in its first 4 KiB, or a byte order mark."""
    with open(path, "rb") as raw:
        head = raw.read(_HEAD)
    return b"\0" not in head or head.startswith(tuple(mark for mark, _ in _MARKS))


def _other_end(path: Path, codec: str) -> int:
    """The first line of a file that ends in another way than the line before it."""
    with open(path, encoding=codec, newline="") as file:
        ends = (line[len(line.rstrip("\r\n")) :] for line in file)
        return next((number for number, (a, b) in enumerate(pairwise(ends), start=2) if a != b), 1)


def _unmarked(head: bytes) -> str:
    """UTF-16 or UTF-32 by its first bytes: NULs at one place of each pair only, where letters have their high byte."""
    first, second, pairs = head[0:-1:2].count(0), head[1::2].count(0), len(head) // 2
    if pairs >= 2 and len(head) % 4 == 0 and any(head):
        if not any(head[2::4]) and not any(head[3::4]):
            return "utf-32-le"
        if not any(head[0::4]) and not any(head[1::4]):
            return "utf-32-be"
    if pairs < 2 or bool(first) == bool(second):
        return ""
    strange = 5 * len(_CONTROLS.findall(head)) >= len(head) or _decoded(head, "utf-8") is None
    return ("utf-16-be" if first else "utf-16-le") if strange or 10 * (first + second) >= 4 * pairs else ""


def _likely(sample: bytes) -> str:
    """An encoding in which these bytes may be text, or none; a guess for a message, by what they would say."""
    if 2 * len(_ALONE.findall(sample)) >= len(_HIGH.findall(sample)):  # letters with accents, and quotation marks
        return "" if _decoded(sample, "cp1252") is None else "cp1252"
    for codec, letters, share in _GUESSES:
        text = _decoded(sample, codec)
        if text is not None and len(re.findall(letters, text)) >= share * sum(c > "\x7f" for c in text):
            return "gb18030" if codec == "gb2312" else codec
    return ""


def _decoded(sample: bytes, codec: str) -> str | None:
    try:  # the sample may end within a character
        return codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeDecodeError:
        return None
