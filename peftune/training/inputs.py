"""What a run starts from, read and checked before any weight is loaded, and what of it makes another run another one.

Also the lock on the directory that it writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.config.data_section import Source
from peftune.config.recipe import Recipe
from peftune.data.batches import Blocks
from peftune.data.documents import split_by_digest
from peftune.data.lint import Finding
from peftune.data.sampler import total_steps
from peftune.data.sources.read import holds_chat
from peftune.data.tokens.special_text import findings
from peftune.data.tokens.store import TokenStore, prepare
from peftune.errors import UserError
from peftune.model import lora, quantized
from peftune.model.base import Base, open_base
from peftune.model.tokenizer import with_new_tokens
from peftune.training.distributed.agreement import flatten, refuse_different_ranks
from peftune.training.distributed.collectives import broadcast, raise_on_all_ranks


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
    """What to know about special tokens in the training text."""


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
    total = total_steps(len(corpus.train), recipe.batch.global_size, recipe.optim.epochs, recipe.optim.steps)
    return RunInputs(recipe, base, tokenizer, corpus, identity_of(recipe, fingerprints), total)


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
        options = how.join, how.split_on, None, how.special_tokens, how.chat
        return prepare(sources, tokenizer, base.tokenizer_fingerprint, *options)

    store = store_of(recipe.data.train)
    chat = all(holds_chat(source, recipe.data.split_on) for source in recipe.data.train)
    train, prints, validation = np.arange(len(store)), {"train": store.fingerprint}, recipe.data.validation
    if isinstance(validation, float | int):
        train, heldout = split_by_digest(store.digests, float(validation))
        if len(train) == 0:
            raise UserError(f"data.validation {validation} leaves no document to learn from; {len(store)} in all")
        domains = {"validation": Blocks.of(store, heldout, block)} if len(heldout) else {}
    else:
        named = validation if isinstance(validation, dict) else {"validation": validation}
        stores = {name: store_of(sources) for name, sources in named.items()}
        domains = {name: Blocks.of(s, np.arange(len(s)), block) for name, s in stores.items()}
        prints |= {f"validation/{name}": s.fingerprint for name, s in stores.items()}
    found = findings(store.special_tokens, base.tokenizer, recipe.data.special_tokens == "parse")
    return Corpus(Blocks.of(store, train, block), domains, prints, chat, tuple(found))


@contextmanager
def sole_writer(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """The first rank locks `out` for this run.

    Raises UserError, on all ranks, where it cannot be written, holds a full model or is locked by another run.
    """
    lock = FileLock(out / ".lock")
    broadcast(accelerator, lambda: _acquire(lock, out))
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, out: Path) -> None:
    try:
        if (out / "config.json").is_file():  # an adapter there would be loaded with it, unasked
            raise UserError(f"run.out {out}: holds a full model; give the adapter a directory of its own")
        out.mkdir(parents=True, exist_ok=True)
        for path in (out, out / "checkpoints"):  # now, not when there is something to write after hours
            if os.path.lexists(path) and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
                raise OSError(errno.EACCES, f"{path.name} is not a directory that may be written to")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"run.out {out}: another run is writing there; wait for it, or choose another name") from None
    except (OSError, ValueError, RecursionError) as error:  # a NUL in the name, a thousand directories
        raise UserError(f"run.out {str(out)[:200]!r}: cannot be written: {getattr(error, 'strerror', error)}") from None


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


def refuse_other_run(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """UserError listing every difference between the run that is there and the one asked for."""
    # What an older release did not record had its default, or cannot be compared.
    unrecorded = _DEFAULTS | {key: now[key] for key in now if key == "fingerprint of config"}
    saved, now = unrecorded | saved, _DEFAULTS | now
    keys = sorted(saved.keys() | now.keys())
    changed = [f"{k} was {_short(saved.get(k))}, is {_short(now.get(k))}" for k in keys if saved.get(k) != now.get(k)]
    if changed:
        raise UserError(
            f"{where} holds a run of another recipe: {'; '.join(changed)}. "
            "Give run.out another name, or remove that directory"
        )


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


_EMPTY = Recipe.model_validate({"base": "-", "data": {"train": "-"}, "run": {"out": "-"}})
_DEFAULTS = {k: v for k, v in identity_of(_EMPTY, {}).items() if k not in ("base", "data.train")}
