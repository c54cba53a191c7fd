"""peftune as a contestant. Everything that benchmarks know of the trainer's inside stands in `TrainingRun`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.memory import Clock
from benchmarks.harness.workers import Channel
from peftune.config.recipe import recipe_from
from peftune.console import Console
from peftune.data.sampler import blocks_of_step
from peftune.model.load import DTYPES, NAME_OF, footprint
from peftune.training.device import choose_precision
from peftune.training.distributed import start
from peftune.training.distributed.signals import StopRequest
from peftune.training.inputs import read_inputs_on_all_ranks
from peftune.training.run import Run, load_run
from peftune.training.step import train_step


class TrainingRun:
    """The optimizer steps of a recipe, one after the other; `run` is as the trainer has it before the first."""

    def __init__(self, values: dict[str, Any], overrides: list[str]) -> None:
        self.recipe = recipe_from(values, overrides)
        with redirect_stdout(sys.stderr):
            accelerator = start.start([], self.recipe.run.out)
            dtype = DTYPES[choose_precision(self.recipe.run.precision, accelerator.device.type == "cuda")]
            inputs = read_inputs_on_all_ranks(self.recipe, accelerator)
            Path(self.recipe.run.out).mkdir(parents=True, exist_ok=True)
            self.run: Run = load_run(inputs, accelerator, dtype, Console(speaks=False))
        self.base, self.train = inputs.base, inputs.corpus.train
        self.parameters: dict[str, torch.nn.Parameter] = self.run.adapted.trainable()

    def step(self) -> int:
        """Take the next step; real tokens it learnt from. The step ends with a host sync (its gradient norm)."""
        r = self.run
        result = train_step(
            r.inputs, r.state, r.forward, r.gradient, r.strategy, r.accelerator, StopRequest(), r.console
        )
        r.state.step += 1
        return result.tokens

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
                window = train.store.window(document, int(train.packing.start[span]), int(train.packing.stop[span]))
                ids, scored = (torch.from_numpy(part.copy()) for part in window)
                yield ids, scored

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
    """Rounds of full steps until `tokens` real tokens; the value is real tokens per second."""
    training = TrainingRun(job["recipe"], job["overrides"])
    clock = Clock(channel, job["tokens"], training.run.accelerator.device.type)
    channel.ready(settings=training.settings(), base_bytes=footprint(training.run.adapted.model).held)
    going = clock.begin()
    while going:
        clock.tokens += training.step()
        going = clock.stepped()
