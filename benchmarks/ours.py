"""peftune as a contestant: a session made from a recipe as the trainer makes it, and the trainer's own step."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.memory import MemoryGrowth
from benchmarks.rounds import Channel
from peftune.config.recipe import Recipe, recipe_from
from peftune.console import Console
from peftune.model.load import DTYPES, footprint
from peftune.training.checkpoint import State
from peftune.training.distributed import zero
from peftune.training.distributed.signals import StopRequest
from peftune.training.micro import first_micro_size
from peftune.training.precision import FIRST_LOSS_SCALE, choose_precision
from peftune.training.setup import Session, assemble, read_together
from peftune.training.step import learn


def begin(recipe: Recipe) -> Session:
    """The session of a recipe on this process, up to where the first step is due."""
    accelerator = zero.start([], recipe.run.out)
    zero.settle(accelerator, recipe)
    on_gpu = accelerator.device.type == "cuda"
    dtype = DTYPES[choose_precision(recipe.run.precision, on_gpu)]
    source = read_together(recipe, accelerator)
    Path(recipe.run.out).mkdir(parents=True, exist_ok=True)
    state = State(loss_scale=FIRST_LOSS_SCALE if recipe.run.precision == "fp16" else 1.0)
    train = source.corpus.train
    state.micro_size = (
        first_micro_size(
            source.config,
            train.packing.block_size,
            min(recipe.batch.global_size, len(train)),
            dtype,
            accelerator.device,
        )
        if recipe.batch.micro_size == "auto"
        else recipe.batch.micro_size
    )
    return assemble(source, accelerator, dtype, Console(speaks=False), state)


class Steps:
    """The optimizer steps of a session, one after the other."""

    def __init__(self, session: Session) -> None:
        self.session, self.stop = session, StopRequest()

    def step(self) -> int:
        """Take the next step; real tokens it learnt from. The step ends with a host sync (its gradient norm)."""
        learnt = learn(self.session, self.stop)
        self.session.state.step += 1
        return learnt.tokens


def serve(job: dict[str, Any], channel: Channel) -> None:
    """Rounds of whole steps until `tokens` real tokens; the value is real tokens per second."""
    with redirect_stdout(sys.stderr):
        session = begin(recipe_from(job["recipe"], job["overrides"]))
    steps, growth = Steps(session), MemoryGrowth(session.accelerator.device.type)
    channel.ready(settings=_settings(session), base_bytes=footprint(session.adapted.model).held)
    for _ in channel.rounds():
        growth.before_first_step()
        start, busy, tokens, taken = time.perf_counter(), time.process_time(), 0, 0
        while tokens < job["tokens"]:
            tokens += steps.step()
            taken += 1
        seconds = time.perf_counter() - start
        channel.answer(
            value=tokens / seconds, tokens=tokens, seconds=seconds, steps=taken, grown=growth.grown(),
            cpu_seconds=time.process_time() - busy,
        )  # fmt: skip


def _settings(session: Session) -> dict[str, Any]:
    recipe, train = session.recipe, session.source.corpus.train
    return {
        "precision": session.precision, "function": session.function.told, "quantize": recipe.quantize,
        "block_size": train.packing.block_size, "fill": round(train.packing.fill(), 3),
        "blocks_per_step": recipe.batch.global_size, "blocks_per_forward": session.micro_size,
        "rank": recipe.lora.rank, "targets": recipe.lora.targets, "base_dropout": recipe.run.base_dropout,
        "documents": len(train.documents),
    }  # fmt: skip
