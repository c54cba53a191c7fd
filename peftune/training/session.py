"""Everything one run holds while it works, and how it is put together from a recipe."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.provenance import base_fingerprint, tokenizer_fingerprint
from peftune.config import Recipe
from peftune.data.order import total_steps
from peftune.display import Display
from peftune.errors import UserError
from peftune.model import base as bases
from peftune.model import lora, quantized
from peftune.model.scorer import Scorer
from peftune.training import identity, optimizer
from peftune.training.checkpoint import State
from peftune.training.corpus import Corpus, block_size, load_corpus
from peftune.training.loading import load_adapted
from peftune.training.records import Records

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Source:
    """What a run starts from, read and checked before any weight is loaded."""

    recipe: Recipe
    directory: Path
    config: GPT2Config
    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    identity: dict[str, Any]
    fingerprints: dict[str, str]
    total_steps: int


@dataclass
class Session:
    """A run in progress; `scorer` and `optimizer` are as the engine wrapped them, `adapted` is what lies inside."""

    source: Source
    accelerator: Accelerator
    display: Display
    adapted: lora.Adapted
    scorer: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    state: State
    records: Records

    @property
    def recipe(self) -> Recipe:
        return self.source.recipe

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def precision(self) -> str:
        mixed = self.accelerator.mixed_precision
        return "fp32" if mixed == "no" else mixed

    @property
    def checkpoints(self) -> Path:
        return Path(self.recipe.run.out) / "checkpoints"


def read_source(recipe: Recipe) -> Source:
    """Find base and data and check all that can be checked without weights; UserError for what does not fit."""
    directory = bases.resolve(recipe.base)
    config = bases.load_config(directory)
    quantized.require(recipe.quantize)
    block = block_size(recipe, config)
    with torch.device("meta"):
        lora.peft_config(GPT2LMHeadModel(config), recipe.lora)
    tokenizer = bases.load_tokenizer(directory)
    prints = {"base": base_fingerprint(directory), "tokenizer": tokenizer_fingerprint(directory)}
    corpus = load_corpus(recipe, tokenizer, prints["tokenizer"], block)
    prints |= {f"data {name}": value for name, value in corpus.fingerprints.items()}
    optim = recipe.optim
    total = total_steps(len(corpus.train), recipe.batch.global_size, optim.epochs, optim.steps)
    return Source(recipe, directory, config, tokenizer, corpus, identity.of(recipe, prints), prints, total)


def assemble(source: Source, accelerator: Accelerator, dtype: torch.dtype, display: Display, state: State) -> Session:
    """Load the base, put the adapter on it, wrap both for the engine, open the records."""
    recipe = source.recipe
    adapted = load_adapted(recipe, source.directory, dtype, accelerator.device)
    parameters = adapted.trainable()
    bare = optimizer.build(parameters, recipe.optim, fused=accelerator.device.type == "cuda")
    scorer, wrapped = accelerator.prepare(Scorer(adapted.model, recipe.optim.neftune), bare)
    scorer.train()
    state.identity = source.identity
    out = Path(recipe.run.out)
    records = Records(out / "metrics.jsonl", accelerator, recipe.model_dump(mode="json"), state.records_bytes)
    return Session(source, accelerator, display, adapted, scorer, wrapped, parameters, state, records)


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold `out` for this run; UserError where it cannot be written, holds a model or another run is writing it."""
    try:
        if (out / "config.json").is_file():  # an adapter there would be loaded with it, unasked
            raise UserError(f"run.out {out}: holds a whole model; give the adapter a directory of its own")
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"run.out {str(out)[:200]!r}: cannot be written: {getattr(error, 'strerror', error)}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"run.out {out}: another run is writing there; wait for it, or choose another name") from None
    try:
        yield
    finally:
        os.close(handle)
