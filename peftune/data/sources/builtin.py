"""Real text that every Python installation carries: three demonstration domains, nothing fetched.

| domain    | text                                              | a document is                               |
|-----------|---------------------------------------------------|---------------------------------------------|
| `code`    | source of the standard library, without its tests | a top-level definition or what lies between |
| `docs`    | the language reference in `pydoc_data.topics`     | a section, or a chunk of a long one         |
| `unicode` | character names from `unicodedata`                | the names of 16 neighbouring code points    |

Each document belongs to one part: `base` (the text that `builtin:small` learnt from, of `code` only), `train`
(for adapters) or `heldout` (for evaluation). The part follows from a hash of the document's name (module,
section title, code point row), so it holds across Python versions and no text changes sides.

Text does move between modules from one Python to the next, and some is repeated. So the base ships the hashes of the
lines it was taught (`TAUGHT`), and a document of which more than half the long lines are among them is in no other
part than `base`.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import tokenize
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from peftune.data.documents import Document

Part = Literal["base", "train", "heldout"]
DOMAINS = ("code", "docs", "unicode")

# Not source that a person would write, or text of the other two domains (code pages list character names).
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
_LEFT_OUT |= {"encodings", "pydoc_data", "html"}
# pdb quotes the reference
_LEFT_OUT_MODULES = ("_sysconfigdata", "this.py", "antigravity.py", "stringprep.py", "pdb.py")
TAUGHT = Path(__file__).parents[2] / "model" / "small" / "taught_lines.npy"
_LONG = 30  # characters; shorter lines are common to all code
_CHUNK = 3000  # characters; a longer section is cut between paragraphs
_UNNAMED_BLOCKS = (
    *("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN"),
    "VARIATION SELECTOR",
)


def documents(domain: str, part: Part) -> list[Document]:
    """All documents of one domain that belong to one part, in a fixed order, without repeated text."""
    named = {"code": _code, "docs": _docs, "unicode": _unicode}[domain](part)
    sources: dict[str, str] = {}
    for text, source in named:
        sources.setdefault(text, source)
    chosen = [Document(t, source=s) for t, s in sources.items() if part == "base" or not _was_taught(t, domain)]
    if domain == "docs" and part == "train":
        return _without_paragraphs_of(documents(domain, "heldout"), chosen)
    return chosen


def part_of(domain: str, name: str) -> Part:
    """The part of a named document: of `code` 88 % teach the base, 6 % adapters; elsewhere 85 % teach adapters."""
    percent = int.from_bytes(hashlib.sha256(f"{domain}:{name}".encode()).digest()[:4], "big") % 100
    if domain == "code":
        return "base" if percent < 88 else "train" if percent < 94 else "heldout"
    return "train" if percent < 85 else "heldout"


def line_hashes(text: str) -> np.ndarray:
    """Hashes, (n,) uint32, of the lines of at least 30 characters, white space at both ends aside."""
    lines = [line.strip().encode() for line in text.splitlines()]
    digests = b"".join(hashlib.blake2b(line, digest_size=4).digest() for line in lines if len(line) >= _LONG)
    return np.frombuffer(digests, dtype="<u4")


def _was_taught(text: str, domain: str) -> bool:
    """Whether the base learnt more than half of the long lines of this text; code without any counts as taught."""
    found = line_hashes(text).tolist()
    return (domain == "code" and not found) or sum(line in _taught() for line in found) * 2 > len(found)


@lru_cache(maxsize=1)
def _taught() -> frozenset[int]:
    return frozenset(np.load(TAUGHT).tolist()) if TAUGHT.is_file() else frozenset()


def _code(part: Part) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        left_out = _LEFT_OUT & set(relative.parts) or relative.name.startswith(_LEFT_OUT_MODULES)
        if left_out or "config-" in relative.parts[0]:
            continue
        if part_of("code", relative.with_suffix("").as_posix()) != part:  # before parsing, which takes seconds for all
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library ships a few files that are broken on purpose
        for line, chunk in _top_level_chunks(source, tree):
            yield chunk, f"{relative.as_posix()}:{line}"


def _top_level_chunks(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A module cut before and after each top-level definition; comments stay with the code they precede."""
    lines = source.splitlines(keepends=True)
    cuts = {0, len(lines)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.end_lineno:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while first > 0 and lines[first - 1].startswith("#"):
                first -= 1
            cuts |= {first, node.end_lineno}
    for first, last in pairwise(sorted(cuts)):
        chunk = "".join(lines[first:last]).strip("\n")
        if len(chunk) >= 40:
            yield first + 1, chunk + "\n"


def _docs(part: Part) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        for title, section in _sections(topics[topic].strip("\n")):
            if part_of("docs", title) == part:
                for chunk in _chunks(section):
                    yield chunk, f"pydoc:{topic}"


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(title, text with its heading) of each underlined heading of a reference page."""
    lines = text.split("\n")
    underlined = re.compile(r"([*=~-])\1{2,}")
    heads = [i for i, line in enumerate(lines[1:]) if underlined.fullmatch(line) and lines[i].strip()]
    for first, last in zip([0, *heads], [*heads, len(lines)], strict=True):
        body = "\n".join(lines[first:last]).strip("\n")
        if body:
            yield lines[first].strip(), body + "\n"


def _chunks(section: str) -> Iterator[str]:
    chunk = ""
    for paragraph in section.split("\n\n"):
        if chunk and len(chunk) + len(paragraph) > _CHUNK:
            yield chunk.strip("\n") + "\n"
            chunk = ""
        chunk += paragraph + "\n\n"
    if chunk.strip():
        yield chunk.strip("\n") + "\n"


def _unicode(part: Part) -> Iterator[tuple[str, str]]:
    for row in range(0, 0x110000, 16):
        name = f"U+{row:04X}"
        if part_of("unicode", name) != part:
            continue
        names = [unicodedata.name(chr(point), "") for point in range(row, row + 16)]
        kept = [name for name in names if name and not name.startswith(_UNNAMED_BLOCKS)]
        if len(kept) >= 4:
            yield "\n".join(kept) + "\n", name


def _without_paragraphs_of(heldout: list[Document], train: list[Document]) -> list[Document]:
    """`train` less every paragraph that stands in `heldout` too: pages of the reference quote each other."""
    taken = {paragraph.strip() for document in heldout for paragraph in document.text.split("\n\n")}
    cleaned = []
    for document in train:
        kept = "\n\n".join(p for p in document.text.split("\n\n") if p.strip() not in taken).strip("\n")
        if kept:
            cleaned.append(Document(kept + "\n", source=document.source))
    return cleaned
