"""Writing the files of a token store, in one pass and in constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from peftune.data.documents import Document
from peftune.data.tokens.encode import Examples

FORMAT = 1
FILES = ("ids.bin", "supervised.bin", "documents.bin")
DOCUMENT = np.dtype([("tokens", "<i8"), ("supervised", "<i8"), ("bytes", "<i8"), ("digest", "<u8")])


@contextmanager
def writing(directory: Path, vocabulary: int) -> Iterator[Writer]:
    """A `Writer` on new files in an existing directory, for ids below `vocabulary`."""
    with ExitStack() as stack:
        yield Writer(directory, vocabulary, {name: stack.enter_context(open(directory / name, "wb")) for name in FILES})


class Writer:
    """Appends tokenised documents to the files in a directory; `finish` completes them with `meta.json`."""

    def __init__(self, directory: Path, vocabulary: int, files: dict[str, BinaryIO]) -> None:
        self.directory = directory
        self.files = files
        self.dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
        self.hashes = {name: hashlib.sha256() for name in FILES}
        self.loose = np.empty(0, dtype=bool)  # scored bits that do not fill a byte yet
        self.documents = self.tokens = 0

    def append(self, examples: Examples, digests: np.ndarray) -> None:
        """Add tokenised documents with their digests (n,) uint64, in order."""
        table = np.empty(len(digests), dtype=DOCUMENT)
        table["tokens"] = examples.lengths
        begins = np.cumsum(examples.lengths) - examples.lengths
        table["supervised"] = np.add.reduceat(examples.supervised, begins, dtype=np.int64)
        table["bytes"] = examples.supervised_bytes
        table["digest"] = digests
        self._write("ids.bin", examples.ids.astype(self.dtype).tobytes())
        bits = np.concatenate([self.loose, examples.supervised])
        whole = len(bits) // 8 * 8
        self._write("supervised.bin", np.packbits(bits[:whole]).tobytes())
        self.loose = bits[whole:]
        self._write("documents.bin", table.tobytes())
        self.documents += len(table)
        self.tokens += int(table["tokens"].sum())

    def finish(self, blank: int) -> None:
        """Write what is left and `meta.json` with the hashes of all files; the directory is then a store."""
        self._write("supervised.bin", np.packbits(self.loose).tobytes())
        for file in self.files.values():
            file.flush()
        hashes = {name: digest.hexdigest() for name, digest in self.hashes.items()}
        content = json.dumps([FORMAT, self.dtype.str, hashes], sort_keys=True)
        meta: dict[str, Any] = {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "documents": self.documents,
            "tokens": self.tokens,
            "blank": blank,
            "sha256": hashes,
            "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        }
        (self.directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    def _write(self, name: str, data: bytes) -> None:
        self.files[name].write(data)
        self.hashes[name].update(data)


def digests_of(documents: Sequence[Document]) -> np.ndarray:
    """First 8 bytes of the SHA-256 of what a reader of each document would see, big-endian: (n,) uint64."""
    digests = (hashlib.sha256(document.content().encode("utf-8")).digest()[:8] for document in documents)
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
