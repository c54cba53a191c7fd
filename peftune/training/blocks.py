"""From a recipe's sources to blocks: what is learnt from, and what is only measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import GPT2Config

from peftune.config.recipe import Recipe, Source
from peftune.data.batches import Blocks
from peftune.data.documents import split_by_digest
from peftune.data.sources.read import holds_chat
from peftune.data.tokens.store import TokenStore, prepare
from peftune.errors import UserError
from peftune.model.base import Base


@dataclass(frozen=True)
class Corpus:
    """Training blocks, evaluation blocks by domain name, and the fingerprints of the text behind each.

    `chat` where every training source holds conversations: only then does an adapter answer as an assistant.
    """

    train: Blocks
    domains: dict[str, Blocks]
    fingerprints: dict[str, str]
    chat: bool


def block_size(recipe: Recipe, config: GPT2Config) -> int:
    """Tokens per block; UserError where the base has fewer positions."""
    asked = recipe.data.block_size
    if asked != "auto" and asked > config.n_positions:
        raise UserError(
            f"data.block_size is {asked}, but {recipe.base} has only {config.n_positions} positions; use that, or auto"
        )
    return config.n_positions if asked == "auto" else asked


def load_corpus(recipe: Recipe, base: Base, block: int) -> Corpus:
    """Tokenise (or find in the cache) and pack all sources of a recipe."""

    def store_of(sources: Sequence[Source]) -> TokenStore:
        return prepare(sources, base.tokenizer, base.tokenizer_fingerprint, recipe.data.join, recipe.data.split_on)

    store = store_of(recipe.data.train)
    chat = all(holds_chat(source, recipe.data.split_on) for source in recipe.data.train)
    everything = np.arange(len(store))
    validation = recipe.data.validation
    if isinstance(validation, float | int):
        learnt, heldout = split_by_digest(store.digests, float(validation))
        if len(learnt) == 0:
            raise UserError(f"data.validation {validation} leaves no document to learn from; {len(store)} in all")
        domains = {"validation": Blocks.of(store, heldout, block)} if len(heldout) else {}
        return Corpus(Blocks.of(store, learnt, block), domains, {"train": store.fingerprint}, chat)
    named = validation if isinstance(validation, dict) else {"validation": validation}
    stores = {name: store_of(sources) for name, sources in named.items()}
    domains = {name: Blocks.of(s, np.arange(len(s)), block) for name, s in stores.items()}
    prints = {"train": store.fingerprint} | {f"validation/{name}": s.fingerprint for name, s in stores.items()}
    return Corpus(Blocks.of(store, everything, block), domains, prints, chat)
