"""Everything that lint says of one corpus, or of all that a run reads, by its text and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peftune.config.data_section import DataSection
from peftune.data.lint.finding import Finding, of_rows
from peftune.data.lint.text_rules import findings_of
from peftune.data.lint.token_rules import Places, leaks, odd_texts, repeated, too_long
from peftune.data.tokens.special_text import findings as special_findings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from peftune.data.tokens.store import TokenStore


def of_corpus(
    store: TokenStore, documents: np.ndarray, tokenizer: PreTrainedTokenizerFast, parse: bool, places: Places
) -> list[Finding]:
    """Findings about rows, special tokens, texts, and the tokens of the documents that are used."""
    special = special_findings(store.report.special_tokens, tokenizer, parse)
    known = {one.what for one in special}
    texts = [one for one in findings_of(store.report.faults) if one.what not in known]
    return [*of_rows(store.left_out), *special, *texts, *odd_texts(store, documents, places)]


class Part(NamedTuple):
    """What a run trains or validates on: a name for people, documents (n,) int64 of a store, and where they stand."""

    name: str
    store: TokenStore
    documents: np.ndarray
    places: Places


def of_run(
    how: DataSection, block: int, tokenizer: PreTrainedTokenizerFast, train: Part, held_out: Sequence[Part]
) -> list[Finding]:
    """Findings about what a run reads, each once; those that are not loud only where `data.lint` is strict."""
    found: list[Finding] = []
    for part in (train, *(part for part in held_out if part.store is not train.store)):
        store, documents, places = part.store, part.documents, part.places
        found += of_corpus(store, documents, tokenizer, how.special_tokens == "parse", places)
        if how.lint == "strict":
            found += [*too_long(store, documents, block, places), *repeated(store, documents, places)]
    learnt = train.store.digests[train.documents]
    for name, store, documents, places in held_out:
        others = documents[~np.isin(store.digests[documents], learnt)]  # equal ones are told of elsewhere
        found += leaks(name, store, others, train.store, train.documents, tokenizer, places)
    return [one for one in dict.fromkeys(found) if one.loud or how.lint == "strict"]
