"""What a run starts from, read and checked before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.base_of import base_of
from peftune.adapters.provenance import merged_text
from peftune.config.data_section import DataSection, Source
from peftune.config.recipe import Recipe
from peftune.console import counted
from peftune.data.batches import Blocks, steps_per_epoch, total_steps
from peftune.data.documents import split_by_digest
from peftune.data.lint.corpus import Part, of_run
from peftune.data.lint.finding import Finding, of_rows, refuse_all
from peftune.data.lint.token_rules import Places, finding
from peftune.data.sources.read import places_of, settle_split
from peftune.data.tokens.store import Prepared, TokenStore, prepare_as
from peftune.errors import UserError
from peftune.model import lora, quantized
from peftune.model.base import Base, open_base
from peftune.model.tokenizer import with_new_tokens
from peftune.training.continued import Continued, continued_from
from peftune.training.distributed.agreement import flatten, refuse_different_ranks
from peftune.training.distributed.collectives import raise_on_all_ranks
from peftune.training.run_directory import FILES, identity_of, sizes_of_files


@dataclass(frozen=True)
class Corpus:
    """Training blocks, evaluation blocks by domain name, and the fingerprints of the text behind each.

    `chat` where every training source holds conversations: only then does an adapter answer as an assistant.
    """

    train: Blocks
    domains: dict[str, Blocks]
    fingerprints: dict[str, str]
    chat: bool
    places: Places
    """Where training documents stand, by their numbers in the store."""
    findings: tuple[Finding, ...] = ()
    """What to know about the text (`data.lint`), rows that were skipped, and what is validated on."""
    also_trained_on: dict[str, int] = field(default_factory=dict)
    """Of each domain that is not held out: how many of its documents are training documents too."""
    left_out: dict[str, Any] = field(default_factory=dict)
    """Rows that are not learnt from or evaluated on, by the name of a fingerprint."""
    notes: tuple[str, ...] = ()
    """How text files were cut into documents, and what was left out."""


@dataclass(frozen=True)
class RunInputs:
    """Recipe, base and data of a run, with what follows from them alone."""

    recipe: Recipe
    base: Base
    tokenizer: PreTrainedTokenizerFast
    """The base's, with the recipe's new tokens."""
    corpus: Corpus
    identity: dict[str, Any]
    total_steps: int
    init: Continued | None = None
    """The adapter that the run goes on from; the recipe is then the one with what it decides."""

    @property
    def settings(self) -> LoraConfig | None:
        """PEFT's, where the recipe cannot say them."""
        return self.init.settings if self.init else None

    def notes(self) -> Iterator[str]:
        """What a person should know of the base, of the adapter that the run begins with, and of the text."""
        yield from self.init.notes() if self.init else ()
        if merged := self.base.merged:
            yield (
                f"{self.base.name} is {merged_text(merged)}: the new adapter is relative to that merged model and "
                "works on it alone"
            )
        yield from self.corpus.notes
        yield from (one.line() for one in self.corpus.findings)

    @property
    def passes(self) -> float:
        """How often each block is seen; the last step of a pass may hold fewer than the others."""
        return self.total_steps / steps_per_epoch(len(self.corpus.train), self.recipe.batch.global_size)

    def description(self, micro_size: int) -> str:
        """What is about to be learnt, and how often; what it is validated on."""
        train, size = self.corpus.train, self.recipe.batch.global_size
        seen = f"{self.passes:.3g} passes"
        if self.passes < 1:
            seen = f"{self.total_steps * size:,} of the {len(train):,} blocks, {self.passes:.2g} passes"
        domains = [
            f"{_domain(name)}: {counted(len(blocks.documents), 'document')}, {blocks.tokens():,} tokens"
            for name, blocks in self.corpus.domains.items()
        ]
        steps = f"{counted(self.total_steps, 'step')} of {counted(size, 'block')}"
        return (
            f"{train.tokens():,} tokens to learn in {len(train):,} blocks of {train.packing.block_size} "
            f"({train.packing.fill():.1%} full), {steps} ({micro_size} a forward): "
            f"{'; '.join([seen, *(domains or ['validation: none'])])}"
        )


def read_inputs(recipe: Recipe, fresh: bool = False, lint: bool = True, known: Sequence[RunInputs] = ()) -> RunInputs:
    """Find base and data and check all that can be checked without weights; UserError for what does not fit.

    With `fresh` the base's fingerprints are computed from its bytes, not remembered. Without `lint` nothing is found
    in the text: another process looks for that. What other recipes read in the same way is `known`.
    """
    _refuse_adapter_as_base(recipe)
    base = next((o.base for o in known if o.recipe.base == recipe.base), None) or open_base(recipe.base, fresh)
    init = None
    if recipe.run.init is not None:
        recipe, init = continued_from(recipe, base)
    if recipe.quantize is not None:
        quantized.require(recipe.quantize)
    block = block_size_of(recipe, base.config)
    if init is None or init.settings is None:
        with torch.device("meta"):
            lora.peft_config(GPT2LMHeadModel(base.config), recipe.lora)
    tokenizer = with_new_tokens(base.tokenizer, recipe.data.new_tokens)  # before the weights: its errors come first
    fingerprints = {"base": base.fingerprint, "tokenizer": base.tokenizer_fingerprint}
    fingerprints |= {"config": base.config_fingerprint, **(init.fingerprints() if init else {})}
    alike = (other.corpus for other in known if other.base is base and _reads_like(other, recipe, block))
    corpus = next(alike, None) or _load_corpus(recipe, tokenizer, base, block, lint)
    fingerprints |= {f"data {name}": value for name, value in corpus.fingerprints.items()}
    identity = identity_of(recipe, fingerprints) | {FILES: sizes_of_files(recipe)}
    total = total_steps(len(corpus.train), recipe.batch.global_size, recipe.optim.epochs, recipe.optim.steps)
    return RunInputs(recipe, base, tokenizer, corpus, identity, total, init)


def block_size_of(recipe: Recipe, base: GPT2Config) -> int:
    """Tokens of a block; UserError for more than the base has positions."""
    asked, positions = recipe.data.block_size, base.n_positions
    if asked != "auto" and asked > positions:
        raise UserError(
            f"data.block_size is {asked}, but {recipe.base} has only {positions} positions; use that, or auto"
        )
    return positions if asked == "auto" else asked


def _refuse_adapter_as_base(recipe: Recipe) -> None:
    path = os.path.expanduser(recipe.base)
    has_adapter, has_model = (os.path.isfile(os.path.join(path, f"{name}config.json")) for name in ("adapter_", ""))
    if has_adapter and not has_model:
        own = base_of(Path(path))
        raise UserError(
            f"base {recipe.base} is an adapter, made for {own}; to go on from it: base={own} run.init={path}"
        )


def _reads_like(other: RunInputs, recipe: Recipe, block: int) -> bool:
    """Whether a recipe makes the same blocks of the same text."""
    same_block = other.corpus.train.packing.block_size == block
    same_data = other.recipe.data.model_copy(update={"block_size": recipe.data.block_size}) == recipe.data
    stops = [one.run.early_stopping is None for one in (other.recipe, recipe)]  # else what is told may differ
    return same_block and same_data and stops[0] == stops[1]


def read_inputs_on_all_ranks(recipe: Recipe, accelerator: Accelerator, known: Sequence[RunInputs] = ()) -> RunInputs:
    """`read_inputs` on every rank: the first of each machine fills the cache and lints, the others find the text there.

    UserError, on all ranks, where another has read another base, tokenizer or text.
    """
    with raise_on_all_ranks(accelerator):
        inputs = read_inputs(recipe, fresh=True, known=known) if accelerator.is_local_main_process else None
    with raise_on_all_ranks(accelerator):
        inputs = inputs or read_inputs(recipe, lint=False, known=known)
    refuse_different_ranks(accelerator, _what_was_read(inputs))
    return inputs


def _what_was_read(inputs: RunInputs) -> dict[str, object]:
    """Fingerprints of base, tokenizer and texts, the base's configuration, and what follows for the steps."""
    fingerprints = {k: v for k, v in inputs.identity.items() if k.startswith("fingerprint of ")}
    config = flatten(inputs.base.stored_config)
    ignored = ("_name_or_path", "transformers_version")  # who saved it, and where
    return {
        **fingerprints,
        **{f"the base's {key}": value for key, value in config.items() if key not in ignored},
        "blocks": len(inputs.corpus.train),
        "steps": inputs.total_steps,
    }


def _load_corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, base: Base, block: int, lint: bool) -> Corpus:
    """Tokenise (or find in the cache) and pack all sources of a recipe; look at what they say where `lint` asks."""

    how, notes = recipe.data, list[str]()
    split_on = settle_split(how.read_as(how.train), how.split_on)  # validation texts are cut as those to learn from

    def read(name: str, sources: Sequence[Source]) -> Prepared:
        found = prepare_as(how, sources, split_on, tokenizer, base.tokenizer_fingerprint)
        notes.extend(f"{name}: {note}" for note in found.notes)
        return found

    def part(name: str, sources: Sequence[Source], store: TokenStore, documents: np.ndarray) -> Part:
        return Part(name, store, documents, partial(places_of, how.read_as(sources), split_on))

    store, train, _ = read("train", how.train)
    chat = store.report.chats == store.report.documents
    prints, named = {"train": store.fingerprint}, how.validation_sources()
    also_trained_on: dict[str, int] = {}
    found, same = list[Finding](), list[Finding]()
    if isinstance(validation := how.validation, float | int):
        learnt, heldout = split_by_digest(store.digests[train], float(validation))
        train, heldout = train[learnt], train[heldout]
        if len(train) == 0:
            raise UserError(f"data.validation {validation} leaves no document to learn from; {len(store)} in all")
        domains = {"validation": Blocks.of(store, heldout, block)} if len(heldout) else {}
        stores = {}
        held_out = [part("validation", how.train, store, heldout)]
        if validation and not domains:
            found.append(_nothing_held_out(recipe, len(store)))
    else:
        read_as = {name: read(name, sources) for name, sources in named.items()}
        domains = {name: Blocks.of(one.store, one.used, block) for name, one in read_as.items()}
        stores = {f"validation/{name}": one.store for name, one in read_as.items()}
        prints |= {name: one.fingerprint for name, one in stores.items()}
        held_out = [part(_domain(name), named[name], one.store, one.used) for name, one in read_as.items()]
        for name, one in zip(read_as, held_out, strict=True):
            if len(equal := np.flatnonzero(np.isin(one.store.digests, store.digests))):
                also_trained_on[name] = len(equal)
                what = f"{one.name} ({len(one.store):,} documents) holds documents that are trained on too"
                same += finding(what, equal, one.places, _NOT_HELD_OUT, True)
    learnt_from, stores = part("train", how.train, store, train), {"train": store} | stores
    findings = _findings(how, block, base, [learnt_from, *held_out], found, same) if lint else ()
    left_out = {name: asdict(s.left_out) for name, s in stores.items() if s.left_out}
    blocks = Blocks.of(store, train, block, how.one_document_per_block)
    return Corpus(blocks, domains, prints, chat, learnt_from.places, findings, also_trained_on, left_out, tuple(notes))


def _findings(
    how: DataSection, block: int, base: Base, parts: list[Part], noticed: list[Finding], same: list[Finding]
) -> tuple[Finding, ...]:
    """What to know about the text, the first of these parts being that which is learnt from.

    `same` are validation documents that are trained on too. UserError for anything at all where `data.lint` is strict.
    """
    learnt, *held_out = parts
    if how.lint == "off":
        stores = {id(part.store): part.store for part in parts}.values()
        return (*(one for store in stores for one in of_rows(store.left_out)), *noticed)
    found = [*of_run(how, block, base.tokenizer, learnt, held_out), *noticed, *same]
    if how.lint == "strict":
        refuse_all(found)
    return tuple(found)


def _domain(name: str) -> str:
    return name if name == "validation" else f"validation {name}"


_NOT_HELD_OUT = "its figures are better than those of new text; take these out of data.train, or validate on others"


def _nothing_held_out(recipe: Recipe, documents: int) -> Finding:
    """What to know where a fraction holds out nothing; UserError where early stopping would wait for it."""
    what = f"data.validation {recipe.data.validation:g} holds out nothing: there is one document, or all are equal"
    advice = "there will be no validation; cut the text into documents (data.split_on), or name files for validation"
    if recipe.run.early_stopping is not None:
        raise UserError(
            f"{what} ({documents:,} in all), and run.early_stopping needs validation; cut the text into documents "
            "(data.split_on), name files in data.validation, or leave early stopping out"
        )
    return Finding(what, 0, "", advice)
