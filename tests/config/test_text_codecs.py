"""Encodings are known by the names that people write, and nothing that is no encoding of text is."""

from __future__ import annotations

import codecs
import encodings
import pkgutil

import pytest

from peftune.config.data_section import Source
from peftune.config.text_codecs import codec_named


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("cp1252", "cp1252"), ("Windows-1252", "cp1252"), ("latin-1", "latin_1"), ("ISO-8859-15", "iso8859_15"),
        ("utf8", "utf_8"), ("UTF-16LE", "utf_16_le"), ("GBK", "gbk"), ("gb18030", "gb18030"), ("sjis", "shift_jis"),
        ("Big5", "big5"), ("KOI8-R", "koi8_r"), ("macintosh", "mac_roman"), ("IBM850", "cp850"), ("euc-kr", "euc_kr"),
    ],
)  # fmt: skip
def test_an_encoding_has_many_names(name: str, codec: str) -> None:
    assert codec_named(name) == codec


def test_every_codec_that_is_taken_is_one_of_text_that_needs_no_mark_and_no_network() -> None:
    every = {module.name for module in pkgutil.iter_modules(encodings.__path__)} | {*encodings.aliases.aliases}
    taken = set()
    for name in every:
        try:
            taken.add(codec_named(name))
        except ValueError:
            continue
    assert len(taken) > 70
    assert all(codecs.lookup(codec)._is_text_encoding for codec in taken)
    assert not {codec for codec in taken if "escape" in codec or codec in ("idna", "punycode", "utf_7", "undefined")}


@pytest.mark.parametrize(
    "name",
    ["rot13", "zip", "bz2", "hex", "base64", "uu", "quopri", "unicode_escape", "raw_unicode_escape", "idna", "punycode",
     "undefined", "mbcs", "oem", "utf-7", "hz", "os", "../../x", "a\0b", "\ud800", "", "cp9999", "x" * 100_000],
)  # fmt: skip
def test_what_is_no_encoding_of_text_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no encoding of text; (did you mean|expected one such as)") as caught:
        Source(path="a.txt", encoding=name)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "near"), [("cp1525", "cp1252"), ("utf-9", "utf-8"), ("gb1803", "gb18030"), ("koi8", "koi8-")]
)
def test_the_nearest_name_is_told(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {near}"):
        codec_named(name)
