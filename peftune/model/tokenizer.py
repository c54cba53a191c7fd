"""The tokenizer of a checkpoint: loaded, checked against the embedding, and recognised again by its fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftune.errors import UserError, first_line
from peftune.files import read_object_if_present
from peftune.model.fingerprint import remembered
from peftune.model.tokenizer_rules import problem_of

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast

FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "config.json",
)  # fmt: skip
"""What a tokenizer is read from, as far as a directory has it."""
_JSON = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(directory: Path, config: GPT2Config) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint directory, with `<|endoftext|>` as its end token.

    Raises UserError where there is none, and where a text could become a token that the embedding has no row for.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"base {directory}: no tokenizer here (tokenizer.json, or vocab.json and merges.txt)")
    for name in _JSON:  # before Transformers, which takes them for what it expects
        state = read_object_if_present(directory / name, f"base {directory}: {name}")
        if name == "tokenizer.json" and state and (problem := problem_of(state)):
            raise UserError(f"base {directory}: {name}: {problem}; use another tokenizer")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, config=config)
    except (
        BaseException
    ) as error:  # whatever a library that is not ours makes of a broken file, a panic of Rust included
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"base {directory}: the tokenizer cannot be read: {first_line(error)}") from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(
            f"base {directory}: expected a fast tokenizer with an end token, found {type(tokenizer).__name__}"
        )
    _check_vocabulary(tokenizer, config.vocab_size, directory)
    return tokenizer  # type: ignore[no-any-return]


def with_new_tokens(tokenizer: PreTrainedTokenizerFast, names: Sequence[str]) -> PreTrainedTokenizerFast:
    """A copy that makes one token of each of these texts; UserError for one that the tokenizer knows already."""
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    if known := [name for name in names if name in vocabulary]:
        raise UserError(f"data.new_tokens: {known[0]} is a token of the base already (id {vocabulary[known[0]]:,})")
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    return grown


def fingerprint(load: Callable[[], PreTrainedTokenizerFast], directory: Path, fresh: bool = False) -> str:
    """sha256 of vocabulary, merges and special tokens, whichever files hold them; `load` is called only if need be."""

    def compute() -> str:
        tokenizer = load()
        inner = json.loads(tokenizer.backend_tokenizer.to_str())
        pairs, splitter = inner["model"].get("merges", []), inner.get("pre_tokenizer") or {}
        splitters = [splitter, *splitter.get("pretokenizers", [])]
        facts = {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs],
            "added": sorted((token["id"], token["content"]) for token in inner["added_tokens"]),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "add_prefix_space": any(part.get("add_prefix_space", False) for part in splitters),
        }
        return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()

    return remembered("tokenizer", [directory / name for name in FILES], compute, fresh)


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, directory: Path) -> None:
    """Every token that a text can become has a row; special ones beyond (a `[PAD]` added later) are never made."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = [number for number in tokenizer.get_vocab().values() if number not in added]
    if len(texts) < 2:
        raise UserError(f"base {directory}: the tokenizer knows {len(texts)} tokens; expected its full vocabulary")
    largest = max(*texts, tokenizer.eos_token_id)
    if largest >= rows:
        raise UserError(
            f"base {directory}: its tokenizer knows token {largest}, but the embedding has {rows} rows; "
            "pass a base with its own tokenizer"
        )
