"""Tokenised documents on disk: written once per content, memory-mapped ever after.

An entry of the cache is a directory named by the hash of everything that decides its bytes (`entry` says what is in
it). It is written beside, read back against its hashes, and renamed; an entry that does not match is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peftune.cache import cache_directory, can_write, check_private
from peftune.config.data_section import DataSection, Source
from peftune.console import Console
from peftune.data.documents import Document, ReadStats, first_of_equals
from peftune.data.lint.text_rules import count_faults, without_an_end
from peftune.data.sources.read import FileStates, identity, read_documents, settle_split, size_of, state_of
from peftune.data.sources.text_files import cut_lines, left_out_lines
from peftune.data.tokens.encode import begin_of_text_id, end_of_text_id, rules_of
from peftune.data.tokens.entry import FORMAT, Entry, Writer, read_entry
from peftune.data.tokens.pipeline import tokenized
from peftune.data.tokens.special_text import special_pattern
from peftune.errors import CheckFailed, UserError
from peftune.files import beside, remove, remove_all_leftovers, staging_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenStore:
    """Tokenised documents; tokens are memory-mapped, arrays over documents are in reading order.

    `lengths`, `supervised_counts`, `supervised_bytes` (n,) int64, `digests` (n,) uint64. `fingerprint` is a SHA-256
    of the tokens and what is scored, whatever files they came from; `report` tells of the sources, `left_out` and
    `cuts` are parts of it.
    """

    def __init__(self, entry: Entry) -> None:
        self.lengths = np.ascontiguousarray(entry.documents["tokens"])
        self.supervised_counts = np.ascontiguousarray(entry.documents["supervised"])
        self.supervised_bytes = np.ascontiguousarray(entry.documents["bytes"])
        self.digests = np.ascontiguousarray(entry.documents["digest"])
        self.fingerprint = entry.fingerprint
        self.report, self.left_out, self.cuts = entry.report, entry.report.left_out, entry.report.cuts
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
    may prepare the same content at once. Where no cache can be written it is done without. Raises UserError for
    unreadable sources, and where there is no document.
    """
    before = [state_of(source) for source in sources]  # of the files, before any is read
    text = _Text(sources, tokenizer, join, settle_split(sources, split_on), special_tokens == "parse", chat)
    key, vocabulary = text.key(tokenizer_fingerprint), len(tokenizer)
    root = cache or cache_directory()
    entry = check_private(root, "tokens", key)
    known = open_store(entry, key, vocabulary)
    if known is not None:
        return known
    try:
        if not can_write(root, "tokens"):
            _say_there_is_no_cache(root)
            with tempfile.TemporaryDirectory(prefix="peftune-", ignore_cleanup_errors=True) as temporary:
                return _tokenize(text, before, key, Path(temporary))  # its files stay mapped without a name
        remove_all_leftovers(entry.parent)
        with staging_directory(entry) as directory:
            written = _tokenize(text, before, key, directory)
            _publish(directory, entry, key, vocabulary)
    except OSError as error:
        reason = f"cannot write the token cache: {error.strerror or error}"
        raise UserError(f"{root}: {reason}; set PEFTUNE_CACHE to a directory with room") from None
    return written


class _Text(NamedTuple):
    """What is tokenised, and all that decides which tokens come of it; `split_on` is settled."""

    sources: Sequence[Source]
    tokenizer: PreTrainedTokenizerFast
    join: str
    split_on: str
    parse: bool
    chat: str

    def key(self, tokenizer_fingerprint: str) -> str:
        """Of the cache: equal where the bytes of the entry are."""
        begin, end = begin_of_text_id(self.tokenizer), end_of_text_id(self.tokenizer)
        rules = [tokenizer_fingerprint, rules_of(self.tokenizer), end, *([begin] if begin != end else [])]
        decisive = [FORMAT, rules, self.join, self.split_on, [identity(source) for source in self.sources]]
        decisive += ["parse special tokens"] if self.parse else []
        decisive += [f"chat {self.chat}"] if self.chat != "plain" else []
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:40]

    def documents(self, stats: ReadStats) -> Iterator[Document]:
        """All of them in order; `stats` learns what is in them."""
        special, tokens = special_pattern(self.tokenizer), set(self.tokenizer.get_added_vocab())
        for source in self.sources:
            stats.documents.append(0)
            stats.chats.append(0)
            for document in read_documents(source, self.split_on, stats, self.chat):
                stats.documents[-1] += 1
                stats.chats[-1] += document.turns is not None
                count_faults(document, stats.faults, tokens)
                for token in set(special.findall(document.content())):
                    stats.special_tokens[token].add(document.source)
                yield document


def _tokenize(text: _Text, before: Sequence[FileStates], key: str, directory: Path) -> TokenStore:
    """Write the entry into an empty directory, and read it back; the store stays mapped when that gets its name."""
    directory.chmod(0o700)
    stats, writer = ReadStats(), Writer(directory, key, len(text.tokenizer))
    with Console().reading("tokenising", size_of(text.sources)) as show:
        for examples in tokenized(text.documents(stats), text.tokenizer, text.join, text.parse):
            writer.append(examples)
            show(stats.bytes_read(), f"{writer.documents:,} documents, {writer.tokens:,} tokens")
    without_an_end(stats.cuts, stats.faults)
    writer.finish(stats)
    for source, state in zip(text.sources, before, strict=True):
        if state_of(source) != state:
            raise UserError(f"{source.path}: was changed while it was read; start again when it is complete")
    written = open_store(directory, key, len(text.tokenizer))
    if written is None:
        raise CheckFailed(f"{directory}: the token files differ from what was written; is the disk full or faulty?")
    if not len(written):
        names = ", ".join(source.path for source in text.sources)
        raise UserError(f"{names}: no document found ({stats.blank} blank); expected at least one with text")
    return written


@lru_cache  # once a process
def _say_there_is_no_cache(root: Path) -> None:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its own has no place either, which takes it four lines
    Console(os.environ.get("LOCAL_RANK", "0") == "0").say(
        f"{root}: no cache can be written there, so texts are read again each time; PEFTUNE_CACHE names another place"
    )


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


class Prepared(NamedTuple):
    """The documents, the numbers of those that are used (n,) int64, and lines for the person."""

    store: TokenStore
    used: np.ndarray
    notes: list[str]


def prepare_as(
    how: DataSection, sources: Sequence[Source], split_on: str, tokenizer: PreTrainedTokenizerFast, fingerprint: str
) -> Prepared:
    """Read sources as the section says, cut by `split_on`, which is the section's as `settle_split` has settled it."""
    sources = how.read_as(sources)
    store = prepare(sources, tokenizer, fingerprint, how.join, split_on, None, how.special_tokens, how.chat)
    notes = [*cut_lines(sources, store.cuts, chosen=True), *left_out_lines(sources)]
    if how.repeats == "keep":
        return Prepared(store, np.arange(len(store)), notes)
    used = first_of_equals(store.digests)
    dropped = len(store) - len(used)
    told = f"{dropped:,} of {len(store):,} documents repeat another and are dropped (data.repeats)"
    return Prepared(store, used, [*notes, told] if dropped else notes)
