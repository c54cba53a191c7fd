"""A tokenizer's vocabulary as GGUF holds it: token texts, kinds and merges, for llama.cpp's own implementation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftune.data.tokens.tiktoken_encoder import FastEncoder, backends_of, fast_encoder
from peftune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama.cpp's kinds of tokens


@dataclass(frozen=True)
class GgufVocabulary:
    """Token texts in byte letters, by id; their kinds; merges as two texts with a space between, best first."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]


def gguf_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int) -> GgufVocabulary:
    """The vocabulary of a model whose embedding has so many rows; rows without a token get a name nobody writes.

    llama.cpp knows GPT-2's own way of cutting and merging. A tokenizer that might give other ids there is refused
    (UserError): its file would load, and be wrong.
    """
    backend = backends_of(tokenizer).own
    fast = fast_encoder(backend)
    if not isinstance(fast, FastEncoder):
        raise UserError(f"this tokenizer cannot be written as GGUF: {fast}, and llama.cpp would make other tokens")
    state: dict[str, Any] = json.loads(backend.to_str())
    texts = {number: text for text, number in tokenizer.get_vocab().items() if number < rows}
    special = {token["id"] for token in state["added_tokens"]}
    tokens = [texts.get(number, f"[UNUSED{number}]") for number in range(rows)]
    kinds = [_CONTROL if n in special else _NORMAL if n in texts else _UNUSED for n in range(rows)]
    return GgufVocabulary(tokens, kinds, [" ".join(pair) for pair in state["model"]["merges"]])
