"""What a run starts from, read and checked before any weight is loaded, and what of it makes another run another one.

Also the lock on the directory that it writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from peft import LoraConfig
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.base_of import base_of
from peftune.adapters.provenance import merged_text
from peftune.config.data_section import Source
from peftune.config.recipe import Recipe
from peftune.data.batches import Blocks
from peftune.data.documents import split_by_digest
from peftune.data.lint import Finding, of_rows
from peftune.data.prepared import Prepared, prepare_as
from peftune.data.sampler import total_steps
from peftune.data.sources.read import holds_chat, settle_split
from peftune.data.tokens.special_text import findings
from peftune.errors import UserError
from peftune.model import lora, quantized
from peftune.model.base import Base, open_base
from peftune.model.tokenizer import with_new_tokens
from peftune.training.continued import Continued, continued_from
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
    """What to know about rows that were skipped, and about special tokens in the training text."""
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
        for finding in self.corpus.findings:
            yield f"{finding.what}: {finding.documents:,} documents, first {finding.first}: {finding.advice}"


def read_inputs(recipe: Recipe, fresh: bool = False) -> RunInputs:
    """Find base and data and check all that can be checked without weights; UserError for what does not fit.

    With `fresh` the base's fingerprints are computed from its bytes, not remembered.
    """
    _refuse_adapter_as_base(recipe)
    base = open_base(recipe.base, fresh)
    init = None
    if recipe.run.init is not None:
        recipe, init = continued_from(recipe, base)
    if recipe.quantize is not None:
        quantized.require(recipe.quantize)
    asked, positions = recipe.data.block_size, base.config.n_positions
    if asked != "auto" and asked > positions:
        raise UserError(
            f"data.block_size is {asked}, but {recipe.base} has only {positions} positions; use that, or auto"
        )
    if init is None or init.settings is None:
        with torch.device("meta"):
            lora.peft_config(GPT2LMHeadModel(base.config), recipe.lora)
    tokenizer = with_new_tokens(base.tokenizer, recipe.data.new_tokens)  # before the weights: its errors come first
    fingerprints = {"base": base.fingerprint, "tokenizer": base.tokenizer_fingerprint}
    fingerprints |= {"config": base.config_fingerprint, **(init.fingerprints() if init else {})}
    corpus = _load_corpus(recipe, tokenizer, base, positions if asked == "auto" else asked)
    fingerprints |= {f"data {name}": value for name, value in corpus.fingerprints.items()}
    total = total_steps(len(corpus.train), recipe.batch.global_size, recipe.optim.epochs, recipe.optim.steps)
    return RunInputs(recipe, base, tokenizer, corpus, identity_of(recipe, fingerprints), total, init)


def _refuse_adapter_as_base(recipe: Recipe) -> None:
    path = os.path.expanduser(recipe.base)
    has_adapter, has_model = (os.path.isfile(os.path.join(path, f"{name}config.json")) for name in ("adapter_", ""))
    if has_adapter and not has_model:
        own = base_of(Path(path))
        raise UserError(
            f"base {recipe.base} is an adapter, made for {own}; to go on from it: base={own} run.init={path}"
        )


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

    how, notes = recipe.data, list[str]()
    split_on = settle_split(how.read_as(how.train), how.split_on)  # validation texts are cut as those to learn from

    def read(name: str, sources: Sequence[Source]) -> Prepared:
        found = prepare_as(how, sources, split_on, tokenizer, base.tokenizer_fingerprint)
        notes.extend(f"{name}: {note}" for note in found.notes)
        return found

    store, train, _ = read("train", how.train)
    chat = all(holds_chat(source, split_on) for source in how.read_as(how.train))
    prints, validation = {"train": store.fingerprint}, how.validation
    if isinstance(validation, float | int):
        learnt, heldout = split_by_digest(store.digests[train], float(validation))
        train, heldout = train[learnt], train[heldout]
        if len(train) == 0:
            raise UserError(f"data.validation {validation} leaves no document to learn from; {len(store)} in all")
        domains = {"validation": Blocks.of(store, heldout, block)} if len(heldout) else {}
        stores = {}
    else:
        named = validation if isinstance(validation, dict) else {"validation": validation}
        read_as = {name: read(name, sources) for name, sources in named.items()}
        domains = {name: Blocks.of(one.store, one.used, block) for name, one in read_as.items()}
        stores = {f"validation/{name}": one.store for name, one in read_as.items()}
        prints |= {name: one.fingerprint for name, one in stores.items()}
    stores = {"train": store} | stores
    left_out = {name: asdict(s.left_out) for name, s in stores.items() if s.left_out}
    found = [finding for s in stores.values() for finding in of_rows(s.left_out)]
    found += findings(store.special_tokens, base.tokenizer, how.special_tokens == "parse")
    return Corpus(Blocks.of(store, train, block), domains, prints, chat, tuple(found), left_out, tuple(notes))


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


def check_writable(out: Path) -> None:
    """UserError where a run could not write its directory; nothing is made."""
    with _told_of(out):
        if (out / "config.json").is_file():  # an adapter there would be loaded with it, unasked
            raise UserError(f"run.out {out}: holds a full model; give the adapter a directory of its own")
        above = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
        for path in (above, out / "checkpoints"):  # now, not when there is something to write after hours
            if os.path.lexists(path) and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
                raise OSError(errno.EACCES, f"{path.name} is not a directory that may be written to")


def _acquire(lock: FileLock, out: Path) -> None:
    check_writable(out)
    with _told_of(out):
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)


@contextmanager
def _told_of(out: Path) -> Iterator[None]:
    """UserError for what goes wrong with the directory of a run."""
    try:
        yield
    except Timeout:
        raise UserError(f"run.out {out}: another run is writing there; wait for it, or choose another name") from None
    except (OSError, ValueError, RecursionError) as error:  # a NUL in the name, a thousand directories
        raise UserError(f"run.out {str(out)[:200]!r}: cannot be written: {getattr(error, 'strerror', error)}") from None


HARMLESS = frozenset(
    {
        "run.out", "run.init", "run.eval_every", "run.save_every", "run.resume", "run.track", "run.samples",
        "run.early_stopping", "run.checkpointing", "run.fast", "run.compile", "batch.micro_size",
        "data.split_on", "data.unknown_files",  # the fingerprints tell whether other documents come of them
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
    saved, now = unrecorded | {k: v for k, v in saved.items() if k not in HARMLESS}, _DEFAULTS | now
    saved, now = _without_unset_keys(saved), _without_unset_keys(now)
    keys = sorted(saved.keys() | now.keys())
    changed = [f"{k} was {_short(saved.get(k))}, is {_short(now.get(k))}" for k in keys if saved.get(k) != now.get(k)]
    if changed:
        raise UserError(
            f"{where} holds a run of another recipe: {'; '.join(changed)}. "
            "Give run.out another name, or remove that directory"
        )


def _without_unset_keys(value: Any) -> Any:
    """A value without the keys of sources that are not set: an older release does not know all of them."""
    if isinstance(value, list):
        return [
            {key: inner for key, inner in one.items() if inner is not None} if isinstance(one, dict) else one
            for one in value
        ]
    return {key: _without_unset_keys(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


_EMPTY = Recipe.model_validate({"base": "-", "data": {"train": "-"}, "run": {"out": "-"}})
_DEFAULTS = {k: v for k, v in identity_of(_EMPTY, {}).items() if k not in ("base", "data.train")}
