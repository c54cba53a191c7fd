"""Tokenised documents on disk: written once per content, memory-mapped ever after.

An entry of the cache is a directory named by the hash of everything that decides its bytes (`entry` says what is in
it). It is written beside, read back against its hashes, and renamed; an entry that does not match is built again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peftune.cache import cache_directory, check_private, private_directory
from peftune.config.data_section import Source
from peftune.console import Console
from peftune.data.documents import ReadStats
from peftune.data.sources.read import identity, read_documents, size_of, state_of
from peftune.data.tokens.encode import begin_of_text_id, end_of_text_id, rules_of
from peftune.data.tokens.entry import FORMAT, Entry, Writer, read_entry
from peftune.data.tokens.pipeline import tokenized
from peftune.data.tokens.special_text import SpecialTextCounter
from peftune.errors import CheckFailed, UserError
from peftune.files import beside, remove, remove_all_leftovers, staging_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenStore:
    """Tokenised documents; tokens are memory-mapped, arrays over documents are in reading order.

    `lengths`, `supervised_counts`, `supervised_bytes` (n,) int64, `digests` (n,) uint64. `fingerprint` is a SHA-256
    of the tokens and what is scored, whatever files they came from. `blank` documents were skipped in the sources;
    `special_tokens` are those that a text spells out, with how many documents do, and the first.
    """

    def __init__(self, entry: Entry) -> None:
        self.lengths = np.ascontiguousarray(entry.documents["tokens"])
        self.supervised_counts = np.ascontiguousarray(entry.documents["supervised"])
        self.supervised_bytes = np.ascontiguousarray(entry.documents["bytes"])
        self.digests = np.ascontiguousarray(entry.documents["digest"])
        self.fingerprint = entry.fingerprint
        self.blank = entry.blank
        self.special_tokens = entry.special
        self._entry = entry
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
        self._entry.check_unchanged()  # pages that were cut off would end the process without a word
        scored = self._entry.bits.array[positions >> 3] >> (7 - (positions & 7)) & 1
        return np.asarray(self._entry.ids.array[positions], dtype=np.int64), np.asarray(scored, dtype=bool)


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_fingerprint: str,
    join: str,
    split_on: str,
    cache: Path | None = None,
    special_tokens: str = "text",
    chat: str = "plain",
) -> TokenStore:
    """The tokenised documents of all sources, from the cache if their content was tokenised before.

    `cache` is the directory that holds `tokens/` (default: $PEFTUNE_CACHE, else ~/.cache/peftune). Several processes
    may prepare the same content at once. Raises UserError for unreadable sources, and where there is no document.
    """
    vocabulary, before = len(tokenizer), [state_of(source) for source in sources]
    identities = [identity(source) for source in sources]
    begin, end = begin_of_text_id(tokenizer), end_of_text_id(tokenizer)
    rules = [tokenizer_fingerprint, rules_of(tokenizer), end, *([begin] if begin != end else [])]
    parse = special_tokens == "parse"
    decisive = [FORMAT, rules, join, split_on, identities, *(["parse special tokens"] if parse else [])]
    decisive += [f"chat {chat}"] if chat != "plain" else []
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:40]
    try:
        root = cache or cache_directory()
        private_directory(root, "tokens")
        entry = check_private(root, "tokens", key)
        remove_all_leftovers(entry.parent)
        known = open_store(entry, key, vocabulary)
        if known is not None:
            return known
        stats, special = ReadStats(), SpecialTextCounter(tokenizer)
        documents = (document for source in sources for document in read_documents(source, split_on, stats, chat))
        with staging_directory(entry) as directory:
            directory.chmod(0o700)
            writer = Writer(directory, key, vocabulary)
            with Console().reading("tokenising", size_of(sources)) as show:
                for examples in tokenized(special.watch(documents), tokenizer, join, parse):
                    writer.append(examples)
                    show(stats.bytes_read(), f"{writer.documents:,} documents, {writer.tokens:,} tokens")
            writer.finish(stats.blank, special.found)
            for source, state in zip(sources, before, strict=True):
                if state_of(source) != state:
                    raise UserError(f"{source.path}: was changed while it was read; start again when it is complete")
            written = open_store(directory, key, vocabulary)  # stays mapped when the directory gets its name
            if written is None:
                raise CheckFailed(
                    f"{directory}: the token files differ from what was written; is the disk full or faulty?"
                )
            if not len(written):
                names = ", ".join(source.path for source in sources)
                raise UserError(f"{names}: no document found ({stats.blank} blank); expected at least one with text")
            _publish(directory, entry, key, vocabulary)
    except OSError as error:
        reason = f"cannot write the token cache: {error.strerror or error}"
        raise UserError(f"{cache or cache_directory()}: {reason}; set PEFTUNE_CACHE to a directory with room") from None
    return written


def open_store(directory: Path, key: str, vocabulary: int) -> TokenStore | None:
    """The store in a directory, or None where there is none or it is not what its own hashes say."""
    entry = read_entry(directory, key, vocabulary)
    return TokenStore(entry) if entry is not None else None


def _publish(directory: Path, entry: Path, key: str, vocabulary: int) -> None:
    """Give a finished directory its name; a valid entry of another process may stay, a damaged one makes room."""
    for _ in range(100):
        try:
            directory.rename(entry)
            return
        except OSError:
            if open_store(entry, key, vocabulary) is not None:
                return
        with suppress(OSError):  # another process may be first
            aside = beside(entry)
            entry.rename(aside)
            remove(aside)
    raise UserError(f"{entry}: cannot be replaced; delete it and start again")
