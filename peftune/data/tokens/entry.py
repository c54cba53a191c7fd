"""The files of one entry of the cache, as they are written and as they are read.

| file             | holds                                                                                 |
|------------------|---------------------------------------------------------------------------------------|
| `ids.bin`        | all token ids, document after document, uint16 (uint32 for a vocabulary above 65,536)   |
| `supervised.bin` | one bit per token, most significant bit first                                           |
| `documents.bin`  | per document: tokens, scored tokens, scored bytes (int64 each), digest (uint64)         |
| `meta.json`      | format, key, dtype, counts, what was seen while the sources were read, hashes            |

Files stay open from the moment they are hashed, so that what is used is what was checked.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from peftune.cache import open_private
from peftune.data.documents import LeftOut, Occurrences, ReadStats
from peftune.data.sources.text_files import RuleCount, by_rule
from peftune.data.tokens.encode import Examples
from peftune.errors import UserError
from peftune.files import parse_json, sha256_of_values

FORMAT = 4
FILES = ("ids.bin", "supervised.bin", "documents.bin")
DOCUMENT = np.dtype([("tokens", "<i8"), ("supervised", "<i8"), ("bytes", "<i8"), ("digest", "<u8")])
_FINGERPRINT = 1  # not FORMAT: a run that an earlier version began goes on if its tokens are the same
_CHUNK = 1 << 20
_META_BYTES = 1 << 22


@dataclass(frozen=True)
class ReadReport:
    """What was seen of the sources while they were read, as it is kept with the tokens.

    `documents` by source, of which `chats` are conversations; `blank` ones were skipped, and the rows of `left_out`.
    `cuts` say by source how text files were cut; `special_tokens` are those that a text spells out, `faults` what lint
    found in the texts, by the name of its rule.
    """

    documents: list[int]
    chats: list[int]
    blank: int
    left_out: LeftOut
    cuts: list[list[RuleCount]]
    special_tokens: dict[str, Occurrences]
    faults: dict[str, Occurrences]


_REPORT = TypeAdapter(ReadReport)


@dataclass(frozen=True)
class Entry:
    """What an entry holds: `ids` and `bits` of all tokens, mapped; `documents` (n,) of DOCUMENT, in memory.

    `fingerprint` is a SHA-256 of the tokens and what is scored, of the bytes that were read.
    """

    ids: MappedFile
    bits: MappedFile
    documents: np.ndarray
    fingerprint: str
    report: ReadReport

    def check_unchanged(self) -> None:
        """UserError where a file was written to or cut since it was read: its pages would be others, or none."""
        self.ids.check_unchanged()
        self.bits.check_unchanged()


class MappedFile:
    """A file that is read once, for its hash and largest value, and then mapped as `array` of `dtype`."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path = path
        self._handle = open_private(path)
        self._seen = _state(self._handle)
        self.sha256, self.largest = _hash(self._handle, dtype)
        size = self._seen[0]
        if size % dtype.itemsize:
            raise ValueError(f"{path}: {size} bytes are not whole values")
        # an empty file cannot be mapped
        buffer = mmap.mmap(self._handle, size, access=mmap.ACCESS_READ) if size else b""
        self.array: np.ndarray = np.frombuffer(buffer, dtype=dtype)
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """UserError where the file was written to or cut since it was opened; hashed again only if it may have been."""
        state = _state(self._handle)
        if state == self._seen:
            return
        if state[0] != self._seen[0] or _hash(self._handle, self.array.dtype)[0] != self.sha256:
            raise UserError(f"{self._path}: was changed while it was in use; start again, and the cache is built anew")
        self._seen = state

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)  # a mapping has a handle of its own


def read_entry(directory: Path, key: str, vocabulary: int) -> Entry | None:
    """The entry in a directory, or None where there is none, or not that of `key`, made of `vocabulary` tokens.

    Raises UserError where others may write to it.
    """
    try:
        meta = _read_meta(directory / "meta.json")
        dtype = _dtype(vocabulary)
        kinds = (dtype, np.dtype(np.uint8), DOCUMENT)
        ids, bits, table = (MappedFile(directory / name, kind) for name, kind in zip(FILES, kinds, strict=True))
        hashes = {name: file.sha256 for name, file in zip(FILES, (ids, bits, table), strict=True)}
        documents = table.array.copy()
        report = _REPORT.validate_python(meta["report"])
        stated = meta["sha256"], meta["dtype"], meta.get("key")  # of another key: one that was moved here
    except (OSError, ValueError, KeyError, TypeError):
        return None
    lengths, tokens = documents["tokens"], len(ids.array)
    fits = (
        stated == (hashes, dtype.str, key)
        and ids.largest < vocabulary
        and int(lengths.sum()) == tokens
        and -(-tokens // 8) == len(bits.array)
        and bool((lengths >= 2).all())  # the token that begins a document and the one that ends it
    )
    fingerprint = sha256_of_values([_FINGERPRINT, dtype.str, hashes])
    return Entry(ids, bits, documents, fingerprint, report) if fits else None


class Writer:
    """Appends tokenised documents to the files in a directory; `finish` completes them with `meta.json`."""

    def __init__(self, directory: Path, key: str, vocabulary: int) -> None:
        self.directory, self.key = directory, key
        self.dtype = _dtype(vocabulary)
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

    def finish(self, stats: ReadStats) -> None:
        """Write what is left and `meta.json` with the hashes of all files; the directory is then an entry."""
        for name in FILES:
            self._write(name, np.packbits(self.partial_byte).tobytes() if name == "supervised.bin" else b"")
        report = ReadReport(
            stats.documents, stats.chats, stats.blank, stats.left_out, [by_rule(cuts) for cuts in stats.cuts],
            dict(stats.special_tokens), dict(stats.faults),
        )  # fmt: skip
        meta: dict[str, Any] = {
            "format": FORMAT,
            "key": self.key,
            "dtype": self.dtype.str,
            "documents": self.documents,
            "tokens": self.tokens,
            "report": asdict(report),
            "sha256": {name: digest.hexdigest() for name, digest in self.hashes.items()},
        }
        text = json.dumps(meta | {"sha256_of_meta": sha256_of_values(meta)}, indent=1) + "\n"
        (self.directory / "meta.json").write_text(text, encoding="utf-8")
        if os.name != "nt":  # there, what may not be written cannot be removed either
            for name in (*FILES, "meta.json"):
                (self.directory / name).chmod(0o444)  # nothing is ever written to it again

    def _write(self, name: str, data: bytes) -> None:
        with (self.directory / name).open("ab") as file:
            file.write(data)
        self.hashes[name].update(data)


def _dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def _read_meta(path: Path) -> dict[str, Any]:
    with open(open_private(path), "rb") as file:
        meta = parse_json(file.read(_META_BYTES))
    stated = meta.pop("sha256_of_meta") if isinstance(meta, dict) else None
    if stated != sha256_of_values(meta) or meta["format"] != FORMAT:
        raise ValueError(f"{path}: not what was written")
    return meta  # type: ignore[no-any-return]


def _hash(handle: int, dtype: np.dtype[Any]) -> tuple[str, int]:
    """sha256 of a file's bytes, and its largest value where it holds plain numbers, else -1."""
    digest, largest = hashlib.sha256(), -1
    with open(handle, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if dtype.names is None and len(chunk) % dtype.itemsize == 0:
                largest = max(largest, int(np.frombuffer(chunk, dtype=dtype).max()))
    return digest.hexdigest(), largest


def _state(handle: int) -> tuple[int, int, int]:
    """Size and times; whatever writes to a file changes one of them, and so does its removal."""
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
