"""Special tokens that a text spells out, such as `<|title|>`: text, unless the recipe says to parse them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftune.data.documents import Occurrences
from peftune.data.lint.finding import Finding
from peftune.data.sources.plain_text import END_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def without_special(backend: Tokenizer) -> str:
    """The tokenizer as JSON whose `encode_special_tokens` makes no special token of any text.

    In a vocabulary that is searched for whole pieces (Unigram) `</s>` is a piece as any other: it gets a name that
    nobody writes. The unknown token stays.
    """
    kind = type(backend.model).__name__
    if kind == "BPE" and not getattr(backend.model, "ignore_merges", False):
        return backend.to_str()
    state = json.loads(backend.to_str())
    model, tokens = state["model"], [token for token in state["added_tokens"] if token["special"]]
    unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
    prefix = secrets.token_hex(16)
    renamed = {token["content"]: prefix + token["content"] for token in tokens if token["content"] != unknown}
    if kind == "Unigram":
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {renamed.get(piece, piece): number for piece, number in model["vocab"].items()}
    for token in tokens:
        token["content"] = renamed.get(token["content"], token["content"])
    return json.dumps(state)


def special_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Matches each special token of the tokenizer where a text spells it out."""
    tokens = sorted(special_texts(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def special_texts(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The texts of the tokenizer's special tokens."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in added | set(tokenizer.all_special_tokens) if text}


def findings(found: Mapping[str, Occurrences], tokenizer: PreTrainedTokenizerFast, parse: bool) -> list[Finding]:
    """What to know about special tokens in a corpus: that they were read as text, or that a token that ends was not."""
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    told = {token: _ENDS if parse else _SPLIT if token == END_OF_TEXT else _TEXT for token in sorted(found)}
    return [
        Finding(f"{token} inside a text", found[token].rows, found[token].places(), advice)
        for token, advice in told.items()
        if not parse or token in ends
    ]


_TEXT = "it is read as plain text, not as the token; to read the token set data.special_tokens: parse, else remove it"
_SPLIT = "it is read as plain text there; split the documents at it (split_on: endoftext) or remove it"
_ENDS = "it is read as the token that begins or ends a text (data.special_tokens: parse); remove it unless it should be"
