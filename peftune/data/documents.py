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
