"""Documents, statistics of reading them, and their split into training and validation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np


@dataclass(frozen=True)
class Document:
    """One text to learn from: plain (`prompt` is None), or a prompt with its completion in `text`.

    `turns` is set for chat: pairs of (text, supervised), already rendered by the template.
    `source` names where it came from, for messages to people (`poems.txt:17`).
    """

    text: str
    prompt: str | None = None
    turns: tuple[tuple[str, bool], ...] | None = None
    source: str = ""

    def content(self) -> str:
        """Everything a reader would see, joined: what the validation split hashes."""
        if self.turns is not None:
            return "".join(text for text, _ in self.turns)
        return self.text if self.prompt is None else f"{self.prompt}\x00{self.text}"


class ReadStats:
    """`blank` documents skipped so far; bytes read so far through `bytes_read`."""

    def __init__(self) -> None:
        self.blank = 0
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


def sample_of(digests: np.ndarray) -> str:
    """The smallest of the distinct digests (n,) uint64 as hexadecimal text, by which the documents are known later."""
    return np.unique(digests)[:_SAMPLE].astype(">u8").tobytes().hex()


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
