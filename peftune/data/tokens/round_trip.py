"""Texts that their tokens do not give back: never with GPT-2's own vocabulary, often with others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from peftune.data.documents import Document
from peftune.data.lint import Finding
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
    counts, first = [0, 0], ["", ""]
    for batch in _batches(documents):
        texts = [document.content() for document in batch]
        for document, text, ids in zip(batch, texts, encode_texts(texts, tokenizer, parse), strict=True):
            given_back = backend.decode(ids, skip_special_tokens=False)
            for kind, found in enumerate((unknown in ids, given_back != text)):
                if found:
                    counts[kind], first[kind] = counts[kind] + 1, first[kind] or document.source
    findings = (
        Finding(
            "text that the tokenizer has no token for",
            counts[0],
            first[0],
            _UNKNOWN.format(token=tokenizer.unk_token),
        ),
        Finding("text that its tokens do not give back", counts[1], first[1], _CHANGED),
    )
    return [finding for finding in findings if finding.documents]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _AT_ONCE)):
        yield batch
