"""What a run starts from, read and checked before any weight is loaded, and what of it makes another run of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.config.data_section import Source
from peftune.config.recipe import Recipe
from peftune.data.batches import Blocks, steps_per_epoch, total_steps
from peftune.data.documents import split_by_digest
from peftune.data.lint import Finding
from peftune.data.sources.read import holds_chat, places_of, state_of
from peftune.data.tokens.special_text import findings
from peftune.data.tokens.store import TokenStore, prepare
from peftune.errors import UserError
from peftune.model import lora, quantized
from peftune.model.base import Base, open_base
from peftune.model.tokenizer import with_new_tokens
from peftune.training.distributed.agreement import flatten, refuse_different_ranks, where_they_differ
from peftune.training.distributed.collectives import raise_on_all_ranks


@dataclass(frozen=True)
class Corpus:
    """Training blocks, evaluation blocks by domain name, and the fingerprints of the text behind each.

    `chat` where every training source holds conversations: only then does an adapter answer as an assistant.
    """

    train: Blocks
    domains: dict[str, Blocks]
    fingerprints: dict[str, str]
    chat: bool
    findings: tuple[Finding, ...] = ()
    """What to know about special tokens in the training text, and about what is validated on."""
    also_trained_on: dict[str, int] = field(default_factory=dict)
    """Of each domain that is not held out: how many of its documents are training documents too."""


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

    def description(self, micro_size: int) -> str:
        """What is about to be learnt, and how often; what it is validated on."""
        train, size = self.corpus.train, self.recipe.batch.global_size
        passes = self.total_steps / steps_per_epoch(len(train), size)
        seen = f"{passes:.3g} passes"
        if passes < 1:
            seen = f"{self.total_steps * size:,} of the {len(train):,} blocks, {passes:.2g} passes"
        domains = [
            f"{_domain(name)}: {len(blocks.documents):,} documents, {blocks.tokens():,} tokens"
            for name, blocks in self.corpus.domains.items()
        ]
        return (
            f"{train.tokens():,} tokens to learn in {len(train):,} blocks of {train.packing.block_size} "
            f"({train.packing.fill():.1%} full), {self.total_steps} steps of {size} blocks ({micro_size} a forward): "
            f"{'; '.join([seen, *(domains or ['validation: none'])])}"
        )


def read_inputs(recipe: Recipe, fresh: bool = False) -> RunInputs:
    """Find base and data and check all that can be checked without weights; UserError for what does not fit.

    With `fresh` the base's fingerprints are computed from its bytes, not remembered.
    """
    base = open_base(recipe.base, fresh)
    if recipe.quantize is not None:
        quantized.require(recipe.quantize)
    asked, positions = recipe.data.block_size, base.config.n_positions
    if asked != "auto" and asked > positions:
        raise UserError(
            f"data.block_size is {asked}, but {recipe.base} has only {positions} positions; use that, or auto"
        )
    with torch.device("meta"):
        lora.peft_config(GPT2LMHeadModel(base.config), recipe.lora)
    tokenizer = with_new_tokens(base.tokenizer, recipe.data.new_tokens)  # before the weights: its errors come first
    fingerprints = {"base": base.fingerprint, "tokenizer": base.tokenizer_fingerprint}
    fingerprints["config"] = base.config_fingerprint
    corpus = _load_corpus(recipe, tokenizer, base, positions if asked == "auto" else asked)
    fingerprints |= {f"data {name}": value for name, value in corpus.fingerprints.items()}
    identity = identity_of(recipe, fingerprints) | {_FILES: sizes_of_files(recipe)}
    total = total_steps(len(corpus.train), recipe.batch.global_size, recipe.optim.epochs, recipe.optim.steps)
    return RunInputs(recipe, base, tokenizer, corpus, identity, total)


def read_inputs_on_all_ranks(recipe: Recipe, accelerator: Accelerator) -> RunInputs:
    """`read_inputs` on every rank: the first of each machine fills the cache, the others find it there.

    UserError, on all ranks, where another has read another base, tokenizer or text.
    """
    with raise_on_all_ranks(accelerator):
        inputs = read_inputs(recipe, fresh=True) if accelerator.is_local_main_process else None
    with raise_on_all_ranks(accelerator):
        inputs = inputs or read_inputs(recipe)
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


def _load_corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, base: Base, block: int) -> Corpus:
    """Tokenise (or find in the cache) and pack all sources of a recipe."""

    def store_of(sources: Sequence[Source]) -> TokenStore:
        how = recipe.data
        return prepare(sources, tokenizer, base.tokenizer_fingerprint, how.join, how.split_on, None, how.special_tokens)

    store = store_of(recipe.data.train)
    chat = all(holds_chat(source, recipe.data.split_on) for source in recipe.data.train)
    train, prints, validation = np.arange(len(store)), {"train": store.fingerprint}, recipe.data.validation
    found = findings(store.special_tokens, base.tokenizer, recipe.data.special_tokens == "parse")
    also_trained_on: dict[str, int] = {}
    if isinstance(validation, float | int):
        train, heldout = split_by_digest(store.digests, float(validation))
        if len(train) == 0:
            raise UserError(f"data.validation {validation} leaves no document to learn from; {len(store)} in all")
        domains = {"validation": Blocks.of(store, heldout, block)} if len(heldout) else {}
        if validation and not domains:
            found.append(_nothing_held_out(recipe, len(store)))
    else:
        named = validation if isinstance(validation, dict) else {"validation": validation}
        stores = {name: store_of(sources) for name, sources in named.items()}
        domains = {name: Blocks.of(s, np.arange(len(s)), block) for name, s in stores.items()}
        prints |= {f"validation/{name}": s.fingerprint for name, s in stores.items()}
        for name, held in stores.items():
            if len(same := np.flatnonzero(np.isin(held.digests, store.digests))):
                also_trained_on[name], first = len(same), int(same[0])
                place = places_of(named[name], recipe.data.split_on, {first})[first]
                what = f"{_domain(name)} ({len(held):,} documents) holds documents that are trained on too"
                found.append(Finding(what, len(same), place, _NOT_HELD_OUT))
    return Corpus(Blocks.of(store, train, block), domains, prints, chat, tuple(found), also_trained_on)


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
    return Finding(what, documents, recipe.data.train[0].path, advice)


HARMLESS = frozenset(
    {
        "run.out", "run.eval_every", "run.save_every", "run.resume", "run.track", "run.samples",
        "run.early_stopping", "run.checkpointing", "run.fast", "run.compile", "batch.micro_size",
    }
)  # fmt: skip
"""Keys that may change between a run and its resumption: none decides what is learnt (beyond rounding)."""


def identity_of(recipe: Recipe, fingerprints: dict[str, str]) -> dict[str, Any]:
    """Flat mapping of every recipe value that decides what is learnt, and the fingerprints of base and data."""
    kept = {k: v for k, v in flatten(recipe.model_dump(mode="json")).items() if k not in HARMLESS}
    return kept | {f"fingerprint of {k}": v for k, v in fingerprints.items()}


_FILES = "files"
"""Key of an identity that is not compared: sizes by path, by which a message can say which file was changed."""
_MOST_FILES = 1000  # that are recorded


def sizes_of_files(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Bytes of the files behind each fingerprint of data, by path; of data of many files, or of a hub, nothing."""
    validation = recipe.data.validation
    named = {} if isinstance(validation, float | int) else validation
    named = named if isinstance(named, dict) else {"validation": named}
    found = {}
    for name, sources in {"train": recipe.data.train, **{f"validation/{k}": v for k, v in named.items()}}.items():
        sizes = {path: size for source in sources for path, _, size, *_ in state_of(source)}
        if 0 < len(sizes) <= _MOST_FILES:
            found[name] = sizes
    return found


def refuse_other_run(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """UserError listing every difference between the run that is there and the one asked for."""
    # What an older release did not record had its default, or cannot be compared.
    unrecorded = _DEFAULTS | {key: now[key] for key in now if key == "fingerprint of config"}
    files = [_mapping(_mapping(values).get(_FILES)) for values in (saved, now)]
    before, after = (
        dict(leaf for key, value in sorted(values.items()) if key != _FILES for leaf in _leaves(key, value))
        for values in (unrecorded | saved, _DEFAULTS | now)
    )
    changed = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            was, is_now = where_they_differ(*(str(values.get(key, "not there")) for values in (before, after)))
            name = key.removeprefix("fingerprint of data ")
            told = _changed_files(*(_mapping(each.get(name)) for each in files)) if name != key else ""
            changed.append(f"{key} was {was}, is {is_now}{told}")
    if changed:
        raise UserError(
            f"{where} holds a run of another recipe: {'; '.join(changed)}. To train this one, give run.out another "
            "name; to go on with that one, undo the change"
        )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is below a key, each value with the way to it (`data.train[1].path`), without what is null."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(f"{key}[{number}]", inner)
    elif value is not None:
        yield key, value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _changed_files(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Which files came, went and have another size since, as far as that is known."""
    if not before or not after:
        return ""
    kinds = {
        "added": after.keys() - before.keys(), "removed": before.keys() - after.keys(),
        "changed": {path for path in before.keys() & after.keys() if before[path] != after[path]},
    }  # fmt: skip
    told = [f"{kind}: {_few(sorted(paths))}" for kind, paths in kinds.items() if paths]
    return f" ({', '.join(told) or 'the same files with the same sizes, with other text'})"


def _few(paths: list[str]) -> str:
    return " ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


_EMPTY = Recipe.model_validate({"base": "-", "data": {"train": "-"}, "run": {"out": "-"}})
_DEFAULTS = {k: v for k, v in identity_of(_EMPTY, {}).items() if k not in ("base", "data.train")}
