"""The tokenizer of a checkpoint: loaded, checked against the embedding, and recognised again by its fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftune.errors import UserError, first_line
from peftune.files import read_object_if_present
from peftune.model.fingerprint import remembered
from peftune.model.tokenizer_rules import cuts_as, is_byte_level, name_ends, problem_of, repair_unknown

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast

VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Where a vocabulary stands: one of them is needed."""
FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "config.json", *VOCABULARIES[2:],
)  # fmt: skip
"""What a tokenizer is read from, as far as a directory has it."""
_GENERATION = "generation_config.json"  # may name the end of text too
_JSON = (
    "tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    _GENERATION,
)  # fmt: skip


def load_tokenizer(directory: Path, config: GPT2Config, stored_config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint directory, with an end token (GPT-2's is `<|endoftext|>`).

    Raises UserError where there is none, and where a text could become a token that the embedding has no row for.
    """
    found = [name for name in VOCABULARIES if (directory / name).is_file()]
    if not found:
        raise UserError(
            f"base {directory}: no tokenizer here (tokenizer.json, "
            "vocab.json and merges.txt, vocab.txt or spiece.model)"
        )
    if found[0].endswith(".model") and not all(_is_installed(name) for name in ("sentencepiece", "google.protobuf")):
        raise UserError(
            f"base {directory}: {found[0]} is read with sentencepiece; "
            "install it with: pip install sentencepiece protobuf"
        )
    stored = {name: read_object_if_present(directory / name, f"base {directory}: {name}") or {} for name in _JSON}
    state = stored["tokenizer.json"]  # all are read before Transformers, which takes them for what it expects
    if problem := problem_of(state):
        raise UserError(f"base {directory}: tokenizer.json: {problem}; use another tokenizer")
    try:
        tokenizer = _from_files(directory, config, state)
        if tokenizer.is_fast:
            repair_unknown(tokenizer)
            name_ends(tokenizer, [stored_config, stored[_GENERATION]], config.vocab_size)
    except BaseException as error:  # whatever a library makes of a broken file, a panic of Rust included
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"base {directory}: the tokenizer cannot be read: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"base {directory}: expected a fast tokenizer, found {type(tokenizer).__name__}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"base {directory}: neither the tokenizer nor config.json names a token that ends a text; "
            "set eos_token in tokenizer_config.json"
        )
    _check_vocabulary(tokenizer, config.vocab_size, directory)
    return tokenizer  # type: ignore[no-any-return]


def _from_files(directory: Path, config: GPT2Config, state: dict[str, Any]) -> Any:
    """By the class that the directory names; as tokenizer.json stands where that class would cut texts otherwise."""
    from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

    plain = not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"))
    if plain and (directory / "vocab.txt").is_file() and getattr(config, "tokenizer_class", None) is None:
        return BertTokenizer.from_pretrained(directory)  # the only kind that is kept so
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, config=config)
    if state and tokenizer.is_fast and not cuts_as(tokenizer.backend_tokenizer, state):
        return PreTrainedTokenizerFast.from_pretrained(directory)
    return tokenizer


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
        if inner["model"]["type"] != "BPE":  # there, more than merges decides
            rules = {key: value for key, value in inner["model"].items() if key != "vocab"}
            scored = inner["model"]["vocab"] if isinstance(inner["model"]["vocab"], list) else None
            facts["model"] = [rules, scored, inner["normalizer"], splitter]
        return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()

    return remembered("tokenizer", [directory / name for name in (*FILES, _GENERATION)], compute, fresh)


def _is_installed(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return (not parent or find_spec(parent) is not None) and find_spec(name) is not None


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, directory: Path) -> None:
    """Every token that a text can become has a row; special ones beyond (a `[PAD]` added later) are never made."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = None if is_byte_level(tokenizer.backend_tokenizer) else tokenizer.unk_token_id
    texts = [number for number in tokenizer.get_vocab().values() if number not in added or number == unknown]
    if len(texts) < 2:
        raise UserError(f"base {directory}: the tokenizer knows {len(texts)} tokens; expected its full vocabulary")
    largest = max(*texts, tokenizer.eos_token_id)
    if largest >= rows:
        raise UserError(
            f"base {directory}: its tokenizer knows token {largest}, but the embedding has {rows} rows; "
            "pass a base with its own tokenizer"
        )
