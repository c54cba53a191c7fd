"""What reading tells beside documents: how many were blank, and how far it has come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO


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
