"""peftune as a contestant. Everything that benchmarks know of the trainer's inside stands in `TrainingRun`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.memory import MemoryGrowth
from benchmarks.harness.workers import Channel
from peftune.config.recipe import Recipe, recipe_from
from peftune.console import Console
from peftune.data.sampler import blocks_of_step
from peftune.model.load import DTYPES, NAME_OF, footprint
from peftune.training.device import choose_precision
from peftune.training.distributed import start
from peftune.training.distributed.signals import StopRequest
from peftune.training.inputs import read_inputs_on_all_ranks
from peftune.training.run import Run, load_run
from peftune.training.step import train_step


def begin(recipe: Recipe) -> Run:
    """A run as the trainer makes it, up to where the first step is due: the one place to follow the trainer's names."""
    accelerator = start.start([], recipe.run.out)
    start.configure(accelerator, recipe)
    dtype = DTYPES[choose_precision(recipe.run.precision, accelerator.device.type == "cuda")]
    inputs = read_inputs_on_all_ranks(recipe, accelerator)
    Path(recipe.run.out).mkdir(parents=True, exist_ok=True)
    return load_run(inputs, accelerator, dtype, Console(speaks=False))


class TrainingRun:
    """The optimizer steps of a recipe, one after the other."""

    def __init__(self, recipe: dict[str, Any], overrides: list[str]) -> None:
        self.recipe = recipe_from(recipe, overrides)
        with redirect_stdout(sys.stderr):
            self.run = begin(self.recipe)
        self.base, self.train = self.run.inputs.base, self.run.inputs.corpus.train
        self.parameters: dict[str, torch.nn.Parameter] = self.run.adapted.trainable()

    def step(self) -> int:
        """Take the next step; real tokens it learnt from. The step ends with a host sync (its gradient norm)."""
        run = self.run
        tokens = train_step(
            run.inputs, run.state, run.forward, run.gradient, run.strategy, run.accelerator, StopRequest(), run.console
        ).tokens
        run.state.step += 1
        return tokens

    def gradients_of_a_step(self) -> dict[str, torch.Tensor]:
        """What the next step hands to the optimizer, by name, in float64; nothing is updated."""
        caught: dict[str, torch.Tensor] = {}

        def catch(gradient: Any, divisor: float, rate: float) -> float:
            caught.update({n: v.cpu().double() / divisor for n, v in zip(self.parameters, gradient.views, strict=True)})
            return 0.0

        self.run.strategy.update = catch  # type: ignore[method-assign]
        self.step()
        return caught

    def documents_of_first_step(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids of each document of the first step, and which of them are scored."""
        train = self.train
        for block in blocks_of_step(0, len(train), self.recipe.batch.global_size, self.recipe.run.seed):
            for span in train.packing.spans(int(block)):
                document = int(train.documents[train.packing.example[span]])
                start, stop = int(train.packing.start[span]), int(train.packing.stop[span])
                ids, scored = (torch.from_numpy(part.copy()) for part in train.store.window(document, start, stop))
                yield ids, scored

    def base_bytes(self) -> int:
        """What the base takes in memory."""
        return footprint(self.run.adapted.model).held

    def settings(self) -> dict[str, Any]:
        """As they are printed with the figures."""
        recipe, train, forward = self.recipe, self.train, self.run.forward
        return {
            "precision": NAME_OF[forward.dtype], "function": forward.description, "quantize": recipe.quantize,
            "block_size": train.packing.block_size, "fill": round(train.packing.fill(), 3),
            "blocks_per_step": recipe.batch.global_size, "blocks_per_forward": forward.micro_size,
            "rank": recipe.lora.rank, "targets": recipe.lora.targets, "base_dropout": recipe.run.base_dropout,
            "documents": len(train.documents),
        }  # fmt: skip


def worker(job: dict[str, Any], channel: Channel) -> None:
    """Rounds of whole steps until `tokens` real tokens; the value is real tokens per second."""
    run = TrainingRun(job["recipe"], job["overrides"])
    growth = MemoryGrowth(run.run.accelerator.device.type)
    channel.ready(settings=run.settings(), base_bytes=run.base_bytes())
    for _ in channel.rounds():
        growth.before_first_step()
        start, busy, tokens, taken = time.perf_counter(), time.process_time(), 0, 0
        while tokens < job["tokens"]:
            tokens += run.step()
            taken += 1
        seconds = time.perf_counter() - start
        channel.answer(
            value=tokens / seconds, tokens=tokens, seconds=seconds, steps=taken, grown=growth.grown(),
            cpu_seconds=time.process_time() - busy,
        )  # fmt: skip
