"""A set of sources as a recipe's `data` section has them read: which documents are used, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peftune.config.data_section import DataSection, Source
from peftune.data.documents import first_of_equals
from peftune.data.sources.text_files import cut_lines, left_out_lines
from peftune.data.tokens.store import TokenStore, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
