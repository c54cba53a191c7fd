"""What is probably wrong with a corpus, by its tokens: odd texts, repeats, held-out text that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from peftune.data.documents import FIRST_PLACES, first_of_equals
from peftune.data.lint.finding import Finding
from peftune.data.lint.shingles import near_duplicates, shared_runs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from peftune.data.tokens.store import TokenStore

Places = Callable[[Iterable[int]], dict[int, str]]
"""Where documents stand, by their numbers."""
_ODD_SHARE = 0.45  # of the corpus's median of bytes a token
_ODD_TOKENS = 32  # shorter ones vary by themselves
_RUN, _WORDS, _LETTERS = 13, 13, 50  # tokens that are compared; words, or characters without spaces, that count
_SAMPLE, _MORE = 2_000, 2  # training documents by which is judged what is usual, and how many times that is too much
_SAMPLE_TOKENS = 500_000
_FORMULAS = 10  # so many of them, or one in ten, share passages where that is usual


def finding(what: str, numbers: Sequence[int] | np.ndarray, places: Places, advice: str, loud: bool) -> list[Finding]:
    """A finding about documents by their numbers, or none."""
    if not len(numbers):
        return []
    first = [int(number) for number in numbers[:FIRST_PLACES]]
    where = places(first)
    return [Finding(what, len(numbers), ", ".join(where[number] for number in first), advice, loud)]


def odd_texts(store: TokenStore, documents: np.ndarray, places: Places) -> list[Finding]:
    """Documents whose text breaks into more than twice as many tokens as is usual in the corpus."""
    counts, sizes = store.supervised_counts[documents], store.supervised_bytes[documents]
    if not len(documents):
        return []
    rates = sizes / np.maximum(counts, 1)
    odd = documents[(rates < _ODD_SHARE * np.median(rates)) & (counts >= _ODD_TOKENS)]
    what = "text that breaks into far more tokens than usual (another language, or no text)"
    return finding(what, odd, places, "it takes the room and steps of real text; look at it, and remove it", True)


def too_long(store: TokenStore, documents: np.ndarray, block: int, places: Places) -> list[Finding]:
    """Documents with a prompt or turns that are over a block."""
    partly = store.supervised_counts[documents] < store.lengths[documents] - 1
    long = documents[partly & (store.lengths[documents] > block)]
    advice = (
        "what is scored beyond the first block is learnt without its prompt; shorten them, or raise data.block_size"
    )
    return finding(f"prompt and completion over a block of {block:,} tokens", long, places, advice, False)


def repeated(store: TokenStore, documents: np.ndarray, places: Places) -> list[Finding]:
    """Documents that are equal to one before them, and those that are nearly so.

    Plain texts of less than a line are left out of the former: people say «No, my lord.» more than once.
    """
    first = documents[first_of_equals(store.digests[documents])]
    equal = np.setdiff1d(documents, first)
    partly = store.supervised_counts[equal] < store.lengths[equal] - 1
    equal = equal[partly | (store.supervised_bytes[equal] >= _LETTERS)]
    advice = "a text is learnt as often as it stands there; data.repeats: drop uses each once"
    near = "it is learnt more often than others, and by heart sooner; keep one of them"
    return [
        *finding("repeats of another document", equal, places, advice, False),
        *finding("nearly another document", near_duplicates(store, first), places, near, False),
    ]


def leaks(
    name: str,
    store: TokenStore,
    documents: np.ndarray,
    known: TokenStore,
    known_documents: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    places: Places,
) -> list[Finding]:
    """Documents to be held out in which a run of 13 words or more is one of the training text."""
    known_documents = known_documents[first_of_equals(known.digests[known_documents])]
    found = _long_runs(shared_runs(store, documents, known, known_documents, _RUN, 1), store, tokenizer)
    if not found:
        return []
    size = max(len(known_documents) / _SAMPLE, known.lengths[known_documents].sum() / _SAMPLE_TOKENS)
    sample = known_documents[:: int(np.ceil(size))]
    usual = _long_runs(shared_runs(known, sample, known, known_documents, _RUN, 2), known, tokenizer)
    if len(usual) >= min(_FORMULAS, len(sample) / 10) and len(found) * len(sample) <= _MORE * len(usual) * len(
        documents
    ):
        return []  # training texts are as much alike among themselves
    what = f"{name}: documents with long passages of the training text"
    advice = "its figures are better than those of new text; hold out whole works or sources instead"
    return finding(what, found, places, advice, True)


def _long_runs(shared: dict[int, list[int]], store: TokenStore, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The documents, rising, in which runs that follow each other make a long passage."""
    found = []
    for number, starts in sorted(shared.items()):
        breaks = np.flatnonzero(np.diff(starts) > 1) + 1
        longest = max(np.split(np.array(starts), breaks), key=len)
        ids = store.window(number, int(longest[0]), int(longest[-1]) + _RUN)[0]
        if _is_long(tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)):
            found.append(number)
    return found


def _is_long(text: str) -> bool:
    """Whether a passage has 13 words, or 50 characters of a script that puts no spaces between them."""
    return len(text.split()) >= _WORDS or sum(character >= "\u0e00" for character in text) >= _LETTERS
