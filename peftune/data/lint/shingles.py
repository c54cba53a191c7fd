"""Runs of tokens as hashes: which documents are nearly equal, and which share long runs with others.

Written here because the tokens are at hand as arrays: datasketch and rensa take every run as a Python string, 12
million for 50 MB of text, where numpy takes seconds for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from peftune.data.tokens.store import TokenStore

_AT_ONCE = 1 << 20  # tokens
_ODD = np.uint64(0x9E3779B97F4A7C15)
_NEAR_TOKENS = 3  # of a run, for near-duplicates
_LEAST = 32  # tokens of a document that can be told to be nearly another
_BINS, _BANDS = 60, 12
_ALIKE = 0.85  # Jaccard similarity
_REMEMBERED = 10_000  # documents
_EMPTY = np.uint64(2**64 - 1)


class Runs(NamedTuple):
    """Hashes (n,) uint64 of runs of tokens, the document (n,) int64 of each, and its first token (n,) int64."""

    hashes: np.ndarray
    document: np.ndarray
    start: np.ndarray


def runs_of(store: TokenStore, documents: np.ndarray, tokens: int, scored_only: bool) -> Iterator[Runs]:
    """Runs of so many tokens within documents, about a million at a time; the ends of a text are in none."""
    at = 0
    ends = np.cumsum(store.lengths[documents])
    while at < len(documents):
        upto = max(at + 1, int(np.searchsorted(ends, (ends[at - 1] if at else 0) + _AT_ONCE, "right")))
        chosen = documents[at:upto]
        lengths = store.lengths[chosen]
        ids, scored = store.windows(chosen, np.zeros(len(chosen), np.int64), lengths)
        if len(ids) >= tokens:
            hashes = np.zeros(len(ids) - tokens + 1, np.uint64)
            for offset in range(tokens):
                hashes *= _ODD
                hashes += ids[offset : offset + len(hashes)].astype(np.uint64) + np.uint64(1)
            hashes ^= hashes >> np.uint64(29)
            hashes *= np.uint64(0xBF58476D1CE4E5B9)
            hashes ^= hashes >> np.uint64(32)
            last = np.cumsum(lengths)
            begin = np.repeat(last - lengths, lengths)[: len(hashes)]
            position = np.arange(len(hashes))
            fits = (position > begin) & (position + tokens < np.repeat(last, lengths)[: len(hashes)])
            if scored_only:
                seen = np.cumsum(np.concatenate([[0], scored]))
                fits &= seen[tokens:] - seen[:-tokens] == tokens
            of = np.repeat(chosen, lengths)[: len(hashes)]
            yield Runs(hashes[fits], of[fits], (position - begin)[fits])
        at = upto


def near_duplicates(store: TokenStore, documents: np.ndarray) -> np.ndarray:
    """Documents, rising, that are nearly one before them: at least 0.85 of their runs of three tokens in common.

    One permutation hashing with empty bins filled from the next (Shrivastava and Li 2014), bands of five bins, and
    every pair that shares a band compared run by run.
    """
    long = documents[store.lengths[documents] >= _LEAST]
    buckets: dict[tuple[int, bytes], int] = {}
    pairs: dict[int, set[int]] = defaultdict(set)
    for hashes, document, _ in runs_of(store, long, _NEAR_TOKENS, scored_only=False):
        numbers = _distinct(document)
        inverse = np.searchsorted(numbers, document)
        least = np.full((len(numbers), _BINS), _EMPTY)
        np.minimum.at(least, (inverse, (hashes % _BINS).astype(np.int64)), hashes)
        for _ in range(_BINS):
            empty = least == _EMPTY
            if not empty.any():
                break
            least = np.where(empty, np.roll(least, -1, axis=1), least)
        for number, bins in zip(numbers.tolist(), least.reshape(len(numbers), _BANDS, -1), strict=True):
            for band, values in enumerate(bins):
                if (first := buckets.setdefault((band, values.tobytes()), number)) != number:
                    pairs[number].add(first)

    @lru_cache(_REMEMBERED)
    def runs(number: int) -> set[tuple[int, ...]]:
        ids = store.ids(number).tolist()
        return {*zip(*(ids[offset:] for offset in range(_NEAR_TOKENS)), strict=False)}

    def alike(one: int, other: int) -> bool:
        common, every = len(runs(one) & runs(other)), len(runs(one)) + len(runs(other))
        return common >= _ALIKE * (every - common)

    found = (one for one, others in sorted(pairs.items()) if any(alike(one, other) for other in others))
    return np.fromiter(found, np.int64)


def _distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, rising; numpy's `unique` goes through a hash table here, at twenty times the time."""
    values = np.sort(values)
    return np.asarray(values[np.diff(values, prepend=values[:1] + 1) != 0])


def shared_runs(
    store: TokenStore, documents: np.ndarray, known: TokenStore, known_documents: np.ndarray, tokens: int, holders: int
) -> dict[int, list[int]]:
    """Of documents with runs of so many scored tokens that just `holders` known ones hold: where, rising, they begin.

    What more of the known documents say is a turn of phrase, and no sign that one of them was copied.
    """
    found = list(runs_of(store, documents, tokens, scored_only=True))
    if not found:
        return {}
    runs = Runs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    hashes = _distinct(runs.hashes)
    maybe = np.zeros(1 << 25, dtype=bool)  # a filter that tells most runs at once
    maybe[hashes % len(maybe)] = True
    held_by = np.zeros(len(hashes), np.int64)  # known documents, of which none is in two parts
    for one in runs_of(known, known_documents, tokens, scored_only=True):
        likely = np.flatnonzero(maybe[one.hashes % len(maybe)])
        likely = likely[np.argsort(one.hashes[likely])]  # in this order they are found faster
        number = np.minimum(np.searchsorted(hashes, one.hashes[likely]), len(hashes) - 1)
        equal = hashes[number] == one.hashes[likely]
        pairs = _distinct(number[equal] << 32 | one.document[likely][equal])
        held_by += np.bincount(pairs >> 32, minlength=len(hashes))
    hits = (held_by == holders)[np.searchsorted(hashes, runs.hashes)]
    starts: dict[int, list[int]] = defaultdict(list)
    for document, start in zip(runs.document[hits].tolist(), runs.start[hits].tolist(), strict=True):
        starts[document].append(start)
    return starts
