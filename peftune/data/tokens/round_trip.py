"""Texts that their tokens do not give back: never with GPT-2's own vocabulary, often with others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from peftune.data.documents import Document, Occurrences
from peftune.data.lint.finding import Finding
from peftune.data.tokens.encode import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_AT_ONCE = 1_000  # documents
_UNKNOWN = "they are read as {token}: the model cannot tell them apart, and bits per byte are lower than they should be"
_CHANGED = "the tokenizer changes letter case, accents, white space or unknown characters: the model learns its form"


def lossy(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, parse: bool) -> list[Finding]:
    """Documents with text that the tokenizer does not know, and those that it does not give back as they stand."""
    backend, unknown = tokenizer.backend_tokenizer, tokenizer.unk_token_id
    if type(backend.decoder).__name__ == "ByteLevel" and backend.normalizer is None:
        return []
    found = [Occurrences(), Occurrences()]
    for batch in _batches(documents):
        texts = [document.content() for document in batch]
        for document, text, ids in zip(batch, texts, encode_texts(texts, tokenizer, parse), strict=True):
            given_back = backend.decode(ids, skip_special_tokens=False)
            for kind, applies in zip(found, (unknown in ids, given_back != text), strict=True):
                if applies:
                    kind.add(document.source)
    whats = (
        ("text that the tokenizer has no token for", _UNKNOWN.format(token=tokenizer.unk_token)),
        ("text that its tokens do not give back", _CHANGED),
    )
    return [
        Finding(what, kind.rows, kind.places(), advice)
        for kind, (what, advice) in zip(found, whats, strict=True)
        if kind.rows
    ]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _AT_ONCE)):
        yield batch
