"""Tokenised documents on disk: written once per content, memory-mapped ever after.

An entry of the cache is a directory named by the hash of everything that decides its bytes:

| file             | holds                                                                                 |
|------------------|---------------------------------------------------------------------------------------|
| `ids.bin`        | all token ids, document after document, uint16 (uint32 for a vocabulary above 65,536)   |
| `supervised.bin` | one bit per token, most significant bit first                                           |
| `documents.bin`  | per document: tokens, scored tokens, scored bytes (int64 each), digest (uint64)         |
| `meta.json`      | format, dtype, counts, blank documents skipped, SHA-256 of each file                    |

It is written beside, read back against its hashes, and renamed; an entry that does not match is built again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftune.config.recipe import Source
from peftune.console import Console
from peftune.data.documents import ReadStats
from peftune.data.sources.read import identity, read_documents, size_of
from peftune.data.tokens.encode import Examples, end_of_text_id
from peftune.data.tokens.pipeline import tokenized
from peftune.errors import CheckFailed, UserError
from peftune.files import beside, cache_directory, sha256_of, staging_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


FORMAT = 1
FILES = ("ids.bin", "supervised.bin", "documents.bin")
DOCUMENT = np.dtype([("tokens", "<i8"), ("supervised", "<i8"), ("bytes", "<i8"), ("digest", "<u8")])


class TokenStore:
    """Tokenised documents, memory-mapped; arrays over documents are in reading order.

    `lengths`, `supervised_counts`, `supervised_bytes` (n,) int64, `digests` (n,) uint64. `fingerprint` is a SHA-256
    of the tokens and what is scored, whatever files they came from. `blank` documents were skipped in the sources.
    """

    def __init__(self, directory: Path, meta: dict[str, Any]) -> None:
        documents = np.asarray(_mapped(directory / "documents.bin", DOCUMENT))
        self.lengths = documents["tokens"]
        self.supervised_counts = documents["supervised"]
        self.supervised_bytes = documents["bytes"]
        self.digests = documents["digest"]
        self.fingerprint: str = meta["fingerprint"]
        self.blank: int = meta["blank"]
        self._ids = _mapped(directory / "ids.bin", np.dtype(meta["dtype"]))
        self._bits = _mapped(directory / "supervised.bin", np.dtype(np.uint8))
        self._first = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=self._first[1:])

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, i: int) -> np.ndarray:
        """Token ids of document i, (length,) int64."""
        return self.window(i, 0, int(self.lengths[i]))[0]

    def supervised(self, i: int) -> np.ndarray:
        """Which tokens of document i are scored, (length,) bool."""
        return self.window(i, 0, int(self.lengths[i]))[1]

    def window(self, i: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of document i: ids int64 and supervised bool, both (stop - start,)."""
        return self.windows(np.array([i]), np.array([start]), np.array([stop]))

    def windows(self, i: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of several documents, one window after another, as `window` gives them."""
        assert (start >= 0).all() and (start <= stop).all() and (stop <= self.lengths[i]).all()
        sizes = stop - start
        positions = np.arange(int(sizes.sum())) + np.repeat(self._first[i] + start - (np.cumsum(sizes) - sizes), sizes)
        scored = self._bits[positions >> 3] >> (7 - (positions & 7)) & 1
        return np.asarray(self._ids[positions], dtype=np.int64), np.asarray(scored, dtype=bool)


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_fingerprint: str,
    join: str,
    split_on: str,
    cache: Path | None = None,
) -> TokenStore:
    """The tokenised documents of all sources, from the cache if their content was tokenised before.

    `cache` is the directory that holds `tokens/` (default: $PEFTUNE_CACHE, else ~/.cache/peftune). Several processes
    may prepare the same content at once. Raises UserError for unreadable sources, and where there is no document.
    """
    identities = [identity(source) for source in sources]
    key = json.dumps([FORMAT, tokenizer_fingerprint, end_of_text_id(tokenizer), join, split_on, identities])
    entry = (cache or cache_directory()) / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:40]
    known = open_store(entry)
    if known is not None:
        return known
    stats = ReadStats()
    documents = (document for source in sources for document in read_documents(source, split_on, stats))
    try:
        with staging_directory(entry) as directory:
            writer = Writer(directory, len(tokenizer))
            with Console().reading("tokenising", size_of(sources)) as show:
                for examples in tokenized(documents, tokenizer, join):
                    writer.append(examples)
                    show(stats.bytes_read(), f"{writer.documents:,} documents, {writer.tokens:,} tokens")
            writer.finish(stats.blank)
            written = open_store(directory)  # stays mapped when the directory gets its name
            if written is None:
                raise CheckFailed(
                    f"{directory}: the token files differ from what was written; is the disk full or faulty?"
                )
            if not len(written):
                names = ", ".join(source.path for source in sources)
                raise UserError(f"{names}: no document found ({stats.blank} blank); expected at least one with text")
            _publish(directory, entry)
    except OSError as error:
        reason = f"cannot write the token cache: {error.strerror or error}"
        raise UserError(f"{entry.parent}: {reason}; set PEFTUNE_CACHE to a directory with room") from None
    return written


def open_store(directory: Path) -> TokenStore | None:
    """The store in a directory, or None where there is none or it is not what its own hashes say."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or any(sha256_of(directory / name) != meta["sha256"][name] for name in FILES):
            return None
        return TokenStore(directory, meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _publish(directory: Path, entry: Path) -> None:
    """Give a finished directory its name; a valid entry of another process may stay, a damaged one makes room."""
    for _ in range(100):
        try:
            directory.rename(entry)
            return
        except OSError:
            if open_store(entry) is not None:
                return
        with suppress(OSError):  # another process may be first
            aside = beside(entry)
            entry.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    raise UserError(f"{entry}: cannot be replaced; delete it and start again")


class Writer:
    """Appends tokenised documents to the files in a directory; `finish` completes them with `meta.json`."""

    def __init__(self, directory: Path, vocabulary: int) -> None:
        self.directory = directory
        self.dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
        self.hashes = {name: hashlib.sha256() for name in FILES}
        self.partial_byte = np.empty(0, dtype=bool)  # scored bits that do not fill a byte yet
        self.documents = self.tokens = 0

    def append(self, examples: Examples) -> None:
        """Add tokenised documents, in order."""
        table = np.empty(len(examples.lengths), dtype=DOCUMENT)
        table["tokens"] = examples.lengths
        begins = np.cumsum(examples.lengths) - examples.lengths
        table["supervised"] = np.add.reduceat(examples.supervised, begins, dtype=np.int64)
        table["bytes"] = examples.supervised_bytes
        table["digest"] = examples.digests
        self._write("ids.bin", examples.ids.astype(self.dtype).tobytes())
        bits = np.concatenate([self.partial_byte, examples.supervised])
        complete = len(bits) // 8 * 8
        self._write("supervised.bin", np.packbits(bits[:complete]).tobytes())
        self.partial_byte = bits[complete:]
        self._write("documents.bin", table.tobytes())
        self.documents += len(table)
        self.tokens += int(table["tokens"].sum())

    def finish(self, blank: int) -> None:
        """Write what is left and `meta.json` with the hashes of all files; the directory is then a store."""
        for name in FILES:
            self._write(name, np.packbits(self.partial_byte).tobytes() if name == "supervised.bin" else b"")
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
        with (self.directory / name).open("ab") as file:
            file.write(data)
        self.hashes[name].update(data)


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r")
