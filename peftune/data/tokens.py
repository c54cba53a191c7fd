"""From `Document` to `Example`: which tokens a document becomes, and which of them are scored.

`<|endoftext|>` + ids + `<|endoftext|>`: the first is context only, the last is always scored, so a model learns to
begin and to stop. Prompt and completion (and the pieces of a chat) are tokenised separately and joined as ids.
Special tokens written out in a text are text: no document can end itself or another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from peftune.data.documents import Document, Example
from peftune.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# A copy of each tokenizer's engine with special tokens off, and the vocabulary size at which it was made.
_plain_engines: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, Tokenizer]] = WeakKeyDictionary()


def tokenize_document(document: Document, tokenizer: PreTrainedTokenizerFast, join: str) -> Example:
    """One tokenised document; see `tokenize_documents`."""
    return tokenize_documents([document], tokenizer, join)[0]


def tokenize_documents(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, join: str) -> list[Example]:
    """Tokenised documents, on all cores.

    `ids` (n,) int64; `supervised` (n,) bool, first False and last True; `supervised_bytes` is the UTF-8 length of the
    scored text with the space that `join` put before it, without `<|endoftext|>`.
    """
    pieces = [pieces_of(document, join) for document in documents]
    encoded = iter(encode_texts([text for document in pieces for text, _ in document], tokenizer))
    end = end_of_text_id(tokenizer)
    return [_example([(next(encoded), text, scored) for text, scored in document], end) for document in pieces]


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Ids of each text as it stands: nothing added, nothing cut, no special token recognised, no warning on length."""
    encodings = _plain_engine(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def pieces_of(document: Document, join: str) -> list[tuple[str, bool]]:
    """What is tokenised on its own, in order, as (text, scored)."""
    if document.turns is not None:
        return list(document.turns)
    if not document.prompt:
        return [(document.text, True)]
    seam_has_space = document.prompt[-1].isspace() or document.text[:1].isspace()
    gap = "" if seam_has_space else join
    return [(document.prompt, False), (gap + document.text, True)]


def end_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that begins and ends documents; UserError for a tokenizer without one."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError("the tokenizer has no end-of-text token; expected <|endoftext|> as eos_token in its config")
    return end


def _example(pieces: list[tuple[list[int], str, bool]], end: int) -> Example:
    count = 2 + sum(len(ids) for ids, _, _ in pieces)
    ids = np.empty(count, dtype=np.int64)
    supervised = np.zeros(count, dtype=bool)
    at, scored_bytes = 1, 0
    for piece, text, scored in pieces:
        ids[at : at + len(piece)] = piece
        supervised[at : at + len(piece)] = scored
        scored_bytes += len(text.encode("utf-8")) if scored else 0
        at += len(piece)
    ids[[0, -1]] = end
    supervised[-1] = True
    return Example(ids, supervised, scored_bytes)


def _plain_engine(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    size = len(tokenizer)
    known = _plain_engines.get(tokenizer)
    if known is None or known[0] != size:
        from tokenizers import Tokenizer

        engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        engine.encode_special_tokens = True
        engine.no_truncation()
        engine.no_padding()
        known = _plain_engines[tokenizer] = (size, engine)
    return known[1]
