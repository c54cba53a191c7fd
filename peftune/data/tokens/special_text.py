"""Special tokens that a text spells out, such as `<|title|>`: text, unless the recipe says to parse them."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
