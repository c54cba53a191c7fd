"""A tokenizer's vocabulary as GGUF holds it: token texts, kinds and merges, for llama.cpp's own implementation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

from peftune.data.tokens.tiktoken_encoder import FastEncoder, backends_of, fast_encoder
from peftune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NORMAL, _CONTROL, _OWN, _UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens; it cuts its users' own out first


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
    state: dict[str, Any] = json.loads(backend.to_str())
    own = [token for token in state["added_tokens"] if not token["special"]]
    if problem := _against(own, state["normalizer"] is not None):
        raise UserError(f"this tokenizer cannot be written as GGUF: {problem}")
    others = [token for token in state["added_tokens"] if token["special"]]
    between = type(backend).from_str(json.dumps({**state, "added_tokens": others}))
    between.encode_special_tokens = True
    fast = fast_encoder(between)
    if not isinstance(fast, FastEncoder):
        raise UserError(f"this tokenizer cannot be written as GGUF: {fast}, and llama.cpp would make other tokens")
    texts = {number: text for text, number in tokenizer.get_vocab().items() if number < rows}
    kind_of = {token["id"]: _CONTROL for token in others} | {token["id"]: _OWN for token in own}
    tokens = [texts.get(number, f"[UNUSED{number}]") for number in range(rows)]
    kinds = [kind_of.get(number, _NORMAL) if number in texts else _UNUSED for number in range(rows)]
    return GgufVocabulary(tokens, kinds, [" ".join(pair) for pair in state["model"]["merges"]])


def _against(own: list[dict[str, Any]], normalises: bool) -> str:
    """Why llama.cpp would cut these added tokens out of a text in another way; empty where it does the same.

    It looks for the longest token first, the tokenizer for the first in the text: one ending as another begins differs.
    """
    for token in own:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or (token["normalized"] and normalises):
            return f"its added token {token['content']!r} matches more than its own text"
    for first, second in permutations((token["content"] for token in own), 2):
        if any(first.endswith(second[:size]) for size in range(1, min(len(first), len(second)))):
            return f"its added token {first!r} ends as {second!r} begins, which llama.cpp would cut in another way"
    return ""
