"""UTF-8 that was read as Latin-1 or Windows-1252 (`Ã©` for é, `â€™` for an apostrophe), and the way back."""

from __future__ import annotations

import re

_HIGH = {byte: bytes([byte]).decode("cp1252", "replace") for byte in range(0x80, 0xC0)}
_READ = {byte: {chr(byte), character} - {"\ufffd"} for byte, character in _HIGH.items()}
_NEXT = "[" + "".join(sorted(set.union(*_READ.values()))) + "]"
_CERTAIN = re.compile("Ã[\u0080-\u00bf]|â€")
_POSSIBLE = re.compile(f"[ÂÃ]{_NEXT}|[âï]{_NEXT}{{2}}|ðŸ{_NEXT}{{2}}|(?:[ÐÑ]{_NEXT}){{2}}")
_BYTES = {ord(character): byte for byte, read in _READ.items() for character in read}


def is_mojibake(text: str) -> bool:
    """Whether a text has what only a wrong conversion writes."""
    if text.isascii() or not _POSSIBLE.search(text):
        return False
    return bool(_CERTAIN.search(text)) or mended(text) != text


def mended(text: str) -> str:
    """The text with each line converted back that is, whole, the UTF-8 of another text; the others as they are."""
    if text.isascii() or not _POSSIBLE.search(text):
        return text
    return "".join(_line_back(line) for line in text.splitlines(keepends=True))


def _line_back(line: str) -> str:
    if not _POSSIBLE.search(line):
        return line
    try:
        return line.translate(_BYTES).encode("latin-1").decode("utf-8")
    except ValueError:  # some of it is text that no conversion has touched
        return line
