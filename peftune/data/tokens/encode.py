"""From `Document` to `Examples`: which tokens a document becomes, and which of them are scored.

Begin of text + ids + end of text, for GPT-2 both `<|endoftext|>`: the first is context only, the last is always
scored, so a model learns to begin and to stop. (With `data.chat: eos-turns` the end follows each turn, and there is no
first.) Prompt and completion (and the parts of a chat) are tokenised separately and joined as ids. Special tokens
written out in a text are text: no document can end itself or another. With `data.special_tokens: parse` they are the
tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from peftune.data.documents import Document
from peftune.data.tokens.tiktoken_encoder import TokenizerBackends, backends_of
from peftune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Examples:
    """Tokenised documents one after another; flat arrays, since a Python value per token costs more than its id.

    `ids` (t,) uint32 and `supervised` (t,) bool over all tokens, `lengths` and `supervised_bytes` (n,) int64 over
    documents. Of each document the first token is context (begin of text), never supervised; the last always is.
    `supervised_bytes` is the UTF-8 length of the scored text with the space that `join` put before it, without
    the end of text. `digests` (n,) uint64 are the first 8 bytes, big-endian, of the SHA-256 of what a reader of each
    document would see.
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    supervised_bytes: np.ndarray
    digests: np.ndarray


def tokenize_batch(
    documents: Sequence[Document], backends: TokenizerBackends, begin: int, end: int, join: str
) -> Examples:
    """Tokenised documents as flat arrays, each between the tokens `begin` and `end`, or with `end` after each turn."""
    parts = [parts_of(document, join) for document in documents]
    texts = [text for document in parts for text, _ in document]
    scored = np.array([scored for document in parts for _, scored in document], dtype=bool)
    found, counts = backends.encode(texts)
    in_each = np.array([len(document) for document in parts], dtype=np.int64)
    ends_turns = np.array([document.ends_turns for document in documents], dtype=bool)
    last_part = np.cumsum(in_each)
    first, last = last_part - in_each, last_part - 1
    ended, begun = np.repeat(ends_turns, in_each), np.zeros(len(texts), dtype=bool)  # of parts
    ended[last], begun[first] = True, ~ends_turns
    sizes = counts + ended + begun
    after = np.cumsum(sizes)
    before = after - sizes
    text = np.ones(int(sizes.sum()), dtype=bool)  # positions of `found`
    text[before[begun]] = text[after[ended] - 1] = False
    ids = np.full(len(text), end, dtype=np.uint32)
    ids[text], ids[before[begun]] = found, begin
    supervised = np.repeat(scored, sizes)
    supervised[before[first]] = False
    lengths = _sums(sizes, last_part)
    in_bytes = np.fromiter((len(t) if t.isascii() else len(t.encode("utf-8")) for t in texts), np.int64, len(texts))
    hashes = b"".join(hashlib.sha256(document.content().encode("utf-8")).digest()[:8] for document in documents)
    digests = np.frombuffer(hashes, dtype=">u8").astype(np.uint64)
    return Examples(ids, supervised, lengths, _sums(in_bytes * scored, last_part), digests)


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, parse: bool = False) -> list[list[int]]:
    """Ids of each text as it stands: nothing added, nothing cut, special tokens as `backends_of` reads them."""
    return backends_of(tokenizer, parse).own_ids(texts)


def parts_of(document: Document, join: str) -> list[tuple[str, bool]]:
    """What is tokenised on its own, in order, as (text, scored)."""
    if document.turns is not None:
        return list(document.turns)
    if not document.prompt:
        return [(document.text, True)]
    gap = "" if document.prompt[-1].isspace() or document.text[:1].isspace() else join
    return [(document.prompt, False), (gap + document.text, True)]


def begin_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that begins documents and prompts: the end of text where the tokenizer has no other."""
    begin = tokenizer.bos_token_id
    return begin if isinstance(begin, int) else end_of_text_id(tokenizer)


def end_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that ends documents; UserError for a tokenizer without one."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError("the tokenizer has no end-of-text token; expected <|endoftext|> as eos_token in its config")
    return end


def rules_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """Everything besides vocabulary and merges that decides which ids a text becomes, as text to be compared."""
    backend = tokenizer.backend_tokenizer
    parts = [
        part.__getstate__().decode() if part is not None else "" for part in (backend.normalizer, backend.pre_tokenizer)
    ]
    names = (
        "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
        "ignore_merges",
    )  # fmt: skip
    options = [type(backend.model).__name__, *(str(getattr(backend.model, name, None)) for name in names)]
    added = [f"{number} {token!r}" for number, token in sorted(tokenizer.added_tokens_decoder.items())]
    return "\n".join(parts + options + added)


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of the slices of `values` that end before `ends` (rising)."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[ends], prepend=0)
