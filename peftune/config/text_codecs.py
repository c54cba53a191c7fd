"""Names of text encodings, as people write them (`cp1252`, `Windows-1252`, `latin-1`), to the codecs that are used.

Python's codecs also unpack archives and decode escapes and domain names; none of those is here.
"""

from __future__ import annotations

import difflib
import re
from encodings import normalize_encoding
from encodings.aliases import aliases

_TEXT = re.compile(
    r"ascii|utf_8(_sig)?|utf_(16|32)(_[lb]e)?|latin_1|iso8859_\d{1,2}|cp\d{3,4}|koi8_[rtu]|mac_\w{3,9}|tis_620|kz1048|"
    r"gb(2312|k|18030)|big5(hkscs)?|shift_jis(_2004|x0213)?|euc_(jp|jis_2004|jisx0213|kr)|johab|ptcp154"
)
_COMMON = ["utf-8", "cp1252", "latin-1", "utf-16", "gb18030"]


def codec_named(name: str) -> str:
    """The codec for an encoding's name; ValueError, with the nearest name, where there is none for text."""
    plain = normalize_encoding(name[:40]).lower()
    codec = aliases.get(plain, plain)
    try:
        if _TEXT.fullmatch(codec):
            "".encode(codec)
            return codec
    except LookupError:  # a number that no code page has
        pass
    known = sorted(codec.replace("_", "-") for codec in {*aliases.values()} if _TEXT.fullmatch(codec))
    written = plain.replace("_", "-")
    near = difflib.get_close_matches(written, _COMMON, 1) or difflib.get_close_matches(written, known, 1)
    advice = f"did you mean {near[0]}?" if near else f"expected one such as {', '.join(_COMMON)}"
    raise ValueError(f"{name[:40]!r} is no encoding of text; {advice}")
