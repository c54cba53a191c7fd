"""Documents, statistics of reading them, and their split into training and validation."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from peftune.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text to learn from: plain (`prompt` is None), or a prompt with its completion in `text`.

    `turns` is set for chat: pairs of (text, supervised), already rendered by the template. With `ends_turns` the
    end-of-text token follows each of them, and nothing stands before the first.
    `source` names where it came from, for messages to people (`poems.txt:17`).
    """

    text: str
    prompt: str | None = None
    turns: tuple[tuple[str, bool], ...] | None = None
    source: str = ""
    ends_turns: bool = False

    def content(self) -> str:
        """Everything a reader would see, joined: what the validation split hashes."""
        if self.turns is not None:
            return ("\n" if self.ends_turns else "").join(text for text, _ in self.turns)
        return self.text if self.prompt is None else f"{self.prompt}\x00{self.text}"


class BadRow(UserError):
    """A row that cannot be learnt from; rows with the same fault have the same `reason`."""

    def __init__(self, location: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{location}: {reason}{detail}")
        self.location, self.reason = location, reason[:100]


FIRST_PLACES = 3
_REASONS, _PLACE_LENGTH = 12, 200


@dataclass
class Occurrences:
    """How many rows or documents have something, and where the first of them stand."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one more, at `place`."""
        self.rows += 1
        if len(self.first) < FIRST_PLACES:
            self.first.append(place[-_PLACE_LENGTH:])

    def places(self) -> str:
        """Where the first of them stand, for people."""
        return ", ".join(self.first)


@dataclass
class LeftOut:
    """Of the `rows` of tables: how many `where` does not want, and the bad ones that were skipped, by reason."""

    rows: int = 0
    unwanted: int = 0
    skipped: dict[str, Occurrences] = field(default_factory=dict)
    never: list[str] = field(default_factory=list)
    """What `where` asks for, among other values, and no row holds."""

    def skip(self, error: BadRow) -> None:
        """Count a bad row."""
        few = error.reason in self.skipped or len(self.skipped) < _REASONS
        self.skipped.setdefault(error.reason if few else "other reasons", Occurrences()).add(error.location)

    def __bool__(self) -> bool:
        return bool(self.unwanted or self.skipped or self.never)


@dataclass
class FileCut:
    """A text file, the rule that cut it, and how many documents came of it.

    `others` are the documents that each rule would have made, this one among them, where `auto` chose.
    """

    file: str
    rule: str
    documents: int
    others: dict[str, int]


class ReadStats:
    """What was left out so far: `blank` documents and, of tables, rows; `cuts` of text files by source.

    `bytes_read` says how far files were read.
    """

    def __init__(self) -> None:
        self.blank = 0
        self.left_out = LeftOut()
        self.cuts: list[list[FileCut]] = []
        self.faults: defaultdict[str, Occurrences] = defaultdict(Occurrences)
        """What text has that lint (`data.lint.text_rules`) knows, by the name of the rule."""
        self.special_tokens: defaultdict[str, Occurrences] = defaultdict(Occurrences)
        """Those that a text spells out."""
        self.documents: list[int] = []
        """By source, as far as it was read to its end: how many."""
        self.chats: list[int] = []
        """By source: how many of them are conversations."""
        self._finished = 0  # bytes of files that were read to their end
        self._file: BinaryIO | None = None

    @contextmanager
    def reading(self, file: BinaryIO) -> Iterator[None]:
        """Count a file's bytes while it is read; all of them once it was left."""
        self._file = file
        yield
        self._file = None
        self._finished += os.fstat(file.fileno()).st_size

    def bytes_read(self) -> int:
        """Bytes of all files so far, as far as the streams have been filled."""
        return self._finished + (self._file.tell() if self._file else 0)


_SAMPLE = 1000  # documents


def sample_of(digests: np.ndarray, earlier: str = "") -> str:
    """The smallest of the distinct digests (n,) uint64 as hexadecimal text, by which the documents are known later.

    With the sample of `earlier` documents it is one of both. ValueError for a text that is no sample.
    """
    known = np.frombuffer(bytes.fromhex(earlier), dtype=">u8").astype(np.uint64)
    return np.union1d(digests, known)[:_SAMPLE].astype(">u8").tobytes().hex()


def count_known(sample: str, digests: np.ndarray) -> tuple[int, int]:
    """How many documents with these digests are among those of `sample`, and how many it can tell of.

    ValueError for a text that is no sample. The smallest digests are a fair choice of documents, and of those up to the
    largest that it holds a full sample tells; one that is not full tells of all (a bottom-k sketch, Cohen 1997).
    """
    known = np.frombuffer(bytes.fromhex(sample), dtype=">u8")
    if len(known) >= _SAMPLE:
        digests = digests[digests <= known.max()]
    return int(np.isin(digests, known).sum()), len(digests)


def split_by_digest(digests: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) indices, int64 in rising order, for digests (n,) uint64 and a fraction in [0, 1).

    A document's side depends on its digest alone, so it keeps it when others come and go. Where the fraction would
    leave one side empty and there are two distinct documents, the smallest (largest) digest goes to validation (train).
    """
    held_out = digests.astype(np.float64) < fraction * 2.0**64
    if fraction > 0 and len(digests) and digests.min() != digests.max():
        if not held_out.any():
            held_out = digests == digests.min()
        elif held_out.all():
            held_out = digests != digests.max()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def first_of_equals(digests: np.ndarray) -> np.ndarray:
    """Indices, int64 in rising order, of the documents that repeat none before them, for digests (n,) uint64."""
    return np.sort(np.unique(digests, return_index=True)[1])
