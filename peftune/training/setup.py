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
from transformers import GPT2LMHeadModel

from peftune.config.recipe import Recipe
from peftune.console import Console
from peftune.data.batches import Batch
from peftune.data.sampler import total_steps
from peftune.errors import UserError
from peftune.model import lora, quantized
from peftune.model.base import Base, open_base
from peftune.model.load import NAME_OF, with_dropout
from peftune.model.loss import LossModel
from peftune.training import forward, identity
from peftune.training.blocks import Corpus, block_size, load_corpus
from peftune.training.checkpoint import State
from peftune.training.distributed import zero
from peftune.training.distributed.collectives import broadcast, raise_on_all_ranks
from peftune.training.distributed.replicated import UpdateStrategy
from peftune.training.forward import ForwardFn
from peftune.training.gradient import Gradient
from peftune.training.loading import load_adapted, recompute_activations
from peftune.training.metrics import Records

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class RunInputs:
    """What a run starts from, read and checked before any weight is loaded."""

    recipe: Recipe
    base: Base
    corpus: Corpus
    identity: dict[str, Any]
    fingerprints: dict[str, str]
    total_steps: int


@dataclass
class Session:
    """A run in progress; `adapted` is the model that lies inside the engine's module."""

    source: RunInputs
    accelerator: Accelerator
    display: Console
    dtype: torch.dtype
    adapted: lora.Adapted
    engine: UpdateStrategy
    gradient: Gradient
    state: State
    records: Records
    function: ForwardFn
    micro_size: int
    """Blocks per forward on this rank: `state.micro_size`, or less once memory ran out here."""

    @property
    def recipe(self) -> Recipe:
        return self.source.recipe

    @property
    def trainable_parameters(self) -> int:
        return self.gradient.flat.numel()

    @property
    def precision(self) -> str:
        return NAME_OF[self.dtype]

    @property
    def checkpoints(self) -> Path:
        return Path(self.recipe.run.out) / "checkpoints"

    def autocast(self) -> torch.autocast:
        """Matrix products in the run's precision."""
        return torch.autocast(self.accelerator.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def score(self, batch: Batch) -> torch.Tensor:
        """Summed nats of a batch (float64 scalar), differentiable in the adapter."""
        if self.function.fast is not None:
            return self.function.train_forward(batch.ids, batch.positions, batch.targets, batch.segments)
        moved = batch.to(self.accelerator.device)
        with self.autocast():
            return self.engine.module(moved.ids, moved.positions, moved.targets, moved.segments)  # type: ignore[no-any-return]


def read_source(recipe: Recipe) -> RunInputs:
    """Find base and data and check all that can be checked without weights; UserError for what does not fit."""
    base = open_base(recipe.base)
    config = base.config
    quantized.require(recipe.quantize)
    block = block_size(recipe, config)
    with torch.device("meta"):
        lora.peft_config(GPT2LMHeadModel(config), recipe.lora)
    assert base.tokenizer, "read first: what is wrong with it is told before the weights are read"
    prints = {"base": base.fingerprint, "tokenizer": base.tokenizer_fingerprint}
    corpus = load_corpus(recipe, base, block)
    prints |= {f"data {name}": value for name, value in corpus.fingerprints.items()}
    optim = recipe.optim
    total = total_steps(len(corpus.train), recipe.batch.global_size, optim.epochs, optim.steps)
    return RunInputs(recipe, base, corpus, identity.of(recipe, prints), prints, total)


def read_together(recipe: Recipe, accelerator: Accelerator) -> RunInputs:
    """`read_source` on every rank: the first of each machine fills the cache, the others find it there."""
    with raise_on_all_ranks(accelerator):
        source = read_source(recipe) if accelerator.is_local_main_process else None
    with raise_on_all_ranks(accelerator):
        source = source or read_source(recipe)
    return source


def assemble(
    source: RunInputs, accelerator: Accelerator, dtype: torch.dtype, display: Console, state: State
) -> Session:
    """Load the base, put the adapter on it, wrap both for the engine, open the records."""
    recipe = source.recipe
    adapted = _load(source, accelerator, dtype)
    parameters = adapted.trainable()
    gradient = Gradient(list(parameters.values()), [p.shape for p in parameters.values()], accelerator.device)
    scorer = LossModel(adapted.model, recipe.optim.neftune, recipe.optim.label_smoothing)
    scorer.train()
    engine = zero.build_strategy(accelerator, scorer, parameters, recipe)
    tokens = source.total_steps * recipe.batch.global_size * source.corpus.train.packing.block_size
    chosen = forward.choose(adapted, recipe, dtype, engine.forward_is_collective, tokens, display.say)
    state.identity = source.identity
    out = Path(recipe.run.out)
    records = Records(out / "metrics.jsonl", accelerator, recipe.model_dump(mode="json"), state.records_bytes)
    return Session(
        source, accelerator, display, dtype, adapted, engine, gradient, state, records, chosen, state.micro_size
    )


def _load(source: RunInputs, accelerator: Accelerator, dtype: torch.dtype) -> lora.Adapted:
    recipe = source.recipe
    if zero.zero_stage(accelerator) != 3:
        with raise_on_all_ranks(accelerator):
            adapted = load_adapted(recipe, source.base, dtype, accelerator.device)
        return adapted
    config = with_dropout(source.base.config, recipe.run.base_dropout)
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            assert source.base.weights, "read on the first rank alone, where errors can still be told by all"
    model = zero.load_sharded(source.base, config, dtype, accelerator)
    adapted = lora.inject(model, recipe.lora, recipe.run.seed)
    if recipe.run.checkpointing:
        recompute_activations(adapted)
    return adapted


@contextmanager
def sole_writer(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """The first rank holds `out` for this run; UserError, on all ranks, where it cannot (see `_hold`)."""
    handle = broadcast(accelerator, lambda: _hold(out))
    try:
        yield
    finally:
        if accelerator.is_main_process:
            os.close(handle)


def _hold(out: Path) -> int:
    """Lock `out`; UserError where it cannot be written, holds a whole model or another run is writing it."""
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
    return handle
