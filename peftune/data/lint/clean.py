"""A cleaned copy of a corpus: only what is safe to mend is mended, every change is counted, the sources stay as is.

Texts are cut as they are when they are learnt from, and written file by file: text as text, csv and tsv as such, all
other rows as jsonl with all their columns, everything as UTF-8 with LF.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from peftune.config.data_section import DataSection, Source
from peftune.data.documents import Document, Occurrences, ReadStats
from peftune.data.lint.finding import Finding
from peftune.data.lint.mojibake import mended
from peftune.data.lint.text_rules import CONTROL, count_faults, findings_of
from peftune.data.rows.row_documents import RowReader
from peftune.data.sources import plain_text, records
from peftune.data.sources.listing import has_rows
from peftune.data.sources.read import files_of, settle_split
from peftune.errors import UserError
from peftune.files import publish, staging_directory, write_json, write_text

DATA = "data"
"""Below the directory that is written: what is to be trained on, with the reports beside it."""
_GAPS = {
    "endoftext": f"\n{plain_text.END_OF_TEXT}\n", "blank-line": "\n\n", "wide-gap": "\n\n\n", "line": "\n", "file": "\n"
}  # fmt: skip


@dataclass
class Cleaned:
    """What was changed, by kind with the first places; what lint still finds; and the files, from and to."""

    changes: dict[str, Occurrences] = field(default_factory=dict)
    remaining: list[Finding] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The report for people."""
        kept, read = (sum(file[key] for file in self.files) for key in ("kept", "read"))
        yield f"{kept:,} of {read:,} documents kept, in {sum(bool(file['to']) for file in self.files):,} files"
        yield from (f"{kind}: {one.rows:,}, first {one.places()}" for kind, one in self.changes.items())
        if not self.changes:
            yield "nothing was to be changed"
        yield from (f"left as it is: {finding.line()}" for finding in self.remaining)


def write_clean(how: DataSection, out: Path) -> Cleaned:
    """Clean what `how` trains on into `out`, which must not exist: `data/`, report.json, report.txt.

    UserError for what cannot be read.
    """
    sources = how.read_as(how.train)
    files = [(source, path) for source in sources for path in _files(source, out)]
    split_on, cleaner = settle_split(sources, how.split_on), _Cleaner(how.chat)
    with staging_directory(out) as directory:
        for number, (source, path) in enumerate(files):
            name = _name(source, path)
            taken = (directory / DATA / name).exists() or (directory / DATA / name).with_suffix(".jsonl").exists()
            target = directory / DATA / (f"{number}-{name.name}" if taken else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if has_rows(path):
                written, read, kept = cleaner.rows(source, path, target)
            else:
                written, read, kept = cleaner.text(
                    source, path, target, settle_split([source], source.split_on or split_on)
                )
            if not kept:
                written.unlink()
            to = str(written.relative_to(directory)) if kept else None
            cleaner.found.files.append({"from": str(path), "to": to, "read": read, "kept": kept})
        found = cleaner.found
        found.remaining = findings_of(cleaner.faults)
        if not any(file["kept"] for file in found.files):
            raise UserError(
                f"{out}: not written, for no document would be left; see what is found in the text as it is"
            )
        write_json(directory / "report.json", asdict(found))
        write_text(directory / "report.txt", "\n".join(found.lines()) + "\n")
        publish(directory, out)
    return found


class _Cleaner:
    """What is remembered from file to file: documents that were kept, and what was changed."""

    def __init__(self, chat: str) -> None:
        self.chat, self.found, self.seen = chat, Cleaned(), set[bytes]()
        self.faults = ReadStats().faults  # of what is written

    def text(self, source: Source, path: Path, target: Path, rule: str) -> tuple[Path, int, int]:
        """Write a cleaned text file; where, and how many documents were read and kept."""
        if rule.startswith("auto"):
            rule, _ = plain_text.how_to_split(path, rule == "auto/several", source.codec())
        self._count_line_ends(path)
        read = kept = 0
        with target.open("w", encoding="utf-8", newline="") as file:
            for line, text in plain_text.split_text(path, rule, None, source.codec()):
                read += 1
                document = Document(self._cleaned(text, place := f"{path}:{line}"), source=place)
                if self._keep([document], document.text, place):
                    file.write((_GAPS[rule] if kept else "") + document.text)
                    kept += 1
            file.write("\n")
        return target, read, kept

    def rows(self, source: Source, path: Path, target: Path) -> tuple[Path, int, int]:
        """Write the cleaned rows of a file; where, and how many were read and kept."""
        separator = records.DELIMITED.get(path.suffix.lower())
        target = target if separator else target.with_suffix(".jsonl")
        read = kept = 0

        def bad(error: Any) -> None:
            self._count("rows that cannot be read, left out", error.location)

        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=source.delimiter or separator or ",", lineterminator="\n")
            for place, row in records.rows(path, list, None, source.codec(), source.delimiter, bad):
                read += 1
                clean = {name: self._clean_value(value, place) for name, value in row.items()}
                self._strip_prompt(source, clean, place)
                if not self._keep_row(source, clean, place):
                    continue
                if separator:
                    if not kept:
                        writer.writerow(clean)
                    writer.writerow(clean.values())
                else:
                    file.write(_line_of(clean))
                kept += 1
        return target, read, kept

    def _keep_row(self, source: Source, row: dict[str, Any], place: str) -> bool:
        stats = ReadStats()
        try:
            documents = list(RowReader(source, stats, self.chat).documents(one for one in [(place, row)]))
        except UserError:  # it is for a person to mend
            return self._keep([], json.dumps(row, default=str), place)
        if stats.blank and not documents:
            self._count("blank rows, left out", place)
            return False
        return self._keep(documents, json.dumps([one.content() for one in documents] or row, default=str), place)

    def _keep(self, documents: list[Document], content: str, place: str) -> bool:
        digest = sha256(content.encode("utf-8", "surrogatepass")).digest()
        if not content.strip():
            self._count("blank documents, left out", place)
            return False
        if digest in self.seen:
            self._count("repeats of another document, left out", place)
            return False
        self.seen.add(digest)
        for document in documents:
            count_faults(document, self.faults)
        return True

    def _cleaned(self, text: str, place: str) -> str:
        if (lf := plain_text.unix_line_ends(text)) != text:
            self._count("line ends made LF", place)
        if (right := mended(lf)) != lf:
            self._count("mojibake turned back", place)
        if (clean := CONTROL.sub("", right)) != right:
            self._count("control characters removed", place)
        return clean

    def _clean_value(self, value: Any, place: str) -> Any:
        if isinstance(value, str):
            return self._cleaned(value, place)
        if isinstance(value, list):
            return [self._clean_value(one, place) for one in value]
        return {k: self._clean_value(v, place) for k, v in value.items()} if isinstance(value, dict) else value

    def _strip_prompt(self, source: Source, row: dict[str, Any], place: str) -> None:
        name = source.prompt or ("prompt" if "completion" in row and not (source.text or source.messages) else None)
        if name is not None and isinstance(prompt := row.get(name), str) and prompt.strip() and prompt[-1].isspace():
            row[name] = prompt.rstrip()
            self._count("white space at the end of prompts removed", place)

    def _count(self, kind: str, place: str) -> None:
        self.found.changes.setdefault(kind, Occurrences()).add(place)

    def _count_line_ends(self, path: Path) -> None:
        with path.open("rb") as file:
            if any(b"\r" in chunk for chunk in iter(lambda: file.read(1 << 20), b"")):
                self._count("line ends made LF", f"{path}:1")


def _line_of(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half a character, which only an escape can spell
        line = json.dumps(row, default=str)
    return f"{line}\n"


def _files(source: Source, out: Path) -> list[Path]:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists; give a directory that does not")
    files = files_of(source)
    if files is None:
        raise UserError(f"{source.path}: only files can be cleaned, not a built-in corpus or a hub data set")
    if Path(source.path).is_dir() and out.resolve().is_relative_to(Path(source.path).resolve()):
        raise UserError(f"{out}: lies within {source.path} and would be read with it; give a directory outside")
    return files


def _name(source: Source, path: Path) -> Path:
    return path.relative_to(source.path) if Path(source.path).is_dir() else Path(path.name)
