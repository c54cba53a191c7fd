"""Writing the files of a token store, in one pass and in constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from peftune.data.documents import Document, Example

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

    def append(self, documents: Sequence[Document], examples: Sequence[Example]) -> None:
        """Add documents with their tokens, in order."""
        table = np.empty(len(examples), dtype=DOCUMENT)
        table["tokens"] = [len(example.ids) for example in examples]
        table["supervised"] = [int(example.supervised.sum()) for example in examples]
        table["bytes"] = [example.supervised_bytes for example in examples]
        table["digest"] = [digest_of(document) for document in documents]
        self._write("ids.bin", _joined(example.ids for example in examples).astype(self.dtype).tobytes())
        bits = np.concatenate([self.loose, *(example.supervised for example in examples)])
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


def digest_of(document: Document) -> int:
    """First 8 bytes of the SHA-256 of what a reader of the document would see, big-endian."""
    return int.from_bytes(hashlib.sha256(document.content().encode("utf-8")).digest()[:8], "big")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
