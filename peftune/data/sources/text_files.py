"""The text files of a source: by which rule each was cut into documents, and what a person is told of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftune.config.data_section import Source
from peftune.config.spelling import spelt
from peftune.console import counted, name_some
from peftune.data.documents import Document, FileCut, ReadStats
from peftune.data.sources import plain_text
from peftune.data.sources.decode import NotDecodable, check_decodable
from peftune.data.sources.listing import list_files
from peftune.errors import UserError

_HOW = {
    "endoftext": f"cut at {plain_text.END_OF_TEXT}",
    "blank-line": "cut at blank lines",
    "wide-gap": "cut at two or more blank lines",
    "line": "one for each line",
    "file": "one for each file",
}
_SECONDS = 10.0  # to look for more files that cannot be decoded
_FEW = 3  # sources that are told one by one


@dataclass
class RuleCount:
    """What one rule made of the text files of a source: `documents` of `files`, of which `blank` have no text.

    `others` are the documents that other rules would have made, where `auto` chose this one.
    """

    rule: str
    files: int = 0
    blank: int = 0
    documents: int = 0
    others: dict[str, int] = field(default_factory=dict)


def text_documents(path: Path, source: Source, split_on: str, stats: ReadStats) -> Iterator[Document]:
    """Documents of one text file; `stats` learns how it was cut."""
    rule, others = split_on, dict[str, int]()
    if split_on.startswith("auto"):
        rule, others = plain_text.how_to_split(path, split_on == "auto/several", source.codec())
    cut = FileCut(name := str(path), rule, 0, others)  # the name once: a corpus may have millions of documents
    stats.cuts[-1].append(cut)
    for line, text in plain_text.split_text(path, rule, stats, source.codec()):
        cut.documents += 1
        yield Document(text, source=f"{name}:{line}")


def name_all(error: NotDecodable, others: Sequence[Path], source: Source) -> UserError:
    """The error of a file, with those of the others, as far as some seconds go, that cannot be decoded either."""
    bad, until = [error], time.monotonic() + _SECONDS
    for path in others:
        if time.monotonic() > until:
            break
        try:
            if path.suffix.lower() != ".parquet":
                check_decodable(path, source.codec())
        except NotDecodable as another:
            bad.append(another)
    files = [f"{one.path}: {one.what}" for one in bad]
    what = files[0] if len(bad) == 1 else f"{len(bad):,} files cannot be decoded: {name_some(files)}"
    advice = f"save {'the file' if len(bad) == 1 else 'them'} as UTF-8"
    if error.likely == "utf-8":
        advice = "the bytes are UTF-8: leave encoding out"
    elif error.likely and {one.likely for one in bad} == {error.likely}:
        advice += f", or try {spelt(encoding=error.likely)}{error.why}"
    elif likely := [f"{one.path} {one.likely}" for one in bad if one.likely]:
        advice += f", or make each a source with its encoding; they look like {name_some(likely)}"
    return UserError(f"{what}; {advice}")


def by_rule(cuts: Sequence[FileCut]) -> list[RuleCount]:
    """The files of one source counted by the rule that cut them."""
    return _summed([RuleCount(cut.rule, 1, int(not cut.documents), cut.documents, cut.others) for cut in cuts])


def cut_lines(sources: Sequence[Source], cuts: Sequence[Sequence[RuleCount]], chosen: bool = False) -> list[str]:
    """A line for each source with text files: how they were cut, and into what other rules would cut them.

    With `chosen` only where `auto` chose one of several ways, or left out blank files.
    """
    texts = [
        (source.path, counts)
        for source, counts in zip(sources, cuts, strict=True)
        if any(not chosen or count.blank or len({*count.others.values()}) > 1 for count in counts)
    ]
    if len(texts) > _FEW:
        every = [count for _, counts in texts for count in counts]
        texts = [(f"{len(texts):,} sources", _summed(every))]
    return [f"{_one_line(path)}: {'; '.join(map(_told, counts))}" for path, counts in texts]


def left_out_lines(sources: Sequence[Source]) -> list[str]:
    """A line for each directory or glob in which files are not read, with their names."""
    lines = []
    for source in sources:
        found = list_files(source)
        if found and (found.hidden or found.unknown):
            kinds = (("hidden", found.hidden), ("neither text nor data", found.unknown))
            told = "; ".join(f"{kind}: {name_some(names)}" for kind, names in kinds if names)
            lines.append(_one_line(f"{source.path}: left out, {told}"))
    return lines


def _summed(counts: Sequence[RuleCount]) -> list[RuleCount]:
    found: dict[str, RuleCount] = {}
    for count in counts:
        one = found.setdefault(count.rule, RuleCount(count.rule))
        one.files, one.blank = one.files + count.files, one.blank + count.blank
        one.documents += count.documents
        one.others = dict(Counter(one.others) + Counter(count.others))
    return list(found.values())


def _told(count: RuleCount) -> str:
    files = "" if count.files == 1 else f"{count.files:,} files, "
    blank = f" ({count.blank:,} blank, left out)" if count.blank else ""
    made = {n: rule for rule, n in reversed(count.others.items()) if n != count.documents}  # of equal ones the first
    others = [f"{rule} would make {n:,}" for n, rule in reversed(made.items())]
    alternative = f"; data.split_on: {', '.join(others)}" if others else ""
    return f"{files}{counted(count.documents, 'document')}{blank}, {_HOW[count.rule]}{alternative}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
