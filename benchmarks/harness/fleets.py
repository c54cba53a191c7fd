"""A fleet's steps beside the same steps taken one after another, in one process, over one base in memory.

All that benchmarks know of a fleet's inside is here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftune.config.recipe import Recipe, recipe_from
from peftune.console import Console
from peftune.errors import CheckFailed
from peftune.model.load import keep_kernels, load_base, with_the_same_weights
from peftune.training.distributed import start
from peftune.training.distributed.signals import StopRequest
from peftune.training.fleet.members import Member
from peftune.training.fleet.train_fleet import MOST_KERNELS, room_of
from peftune.training.inputs import RunInputs, read_inputs_on_all_ranks
from peftune.training.loading import Run, Shared, load_run
from peftune.training.step import StepResult, steps_together

LIMIT = 1e-5
"""Of the relative difference between a loss in a fleet and alone, in fp32."""


class FleetSteps:
    """Steps of the same recipes, each adapter twice: `together` in shared forwards, and `alone`, one after another."""

    def __init__(self, values: Sequence[dict[str, Any]], overrides: Sequence[str]) -> None:
        recipes = [recipe_from(each, [*overrides]) for each in values]
        keep_kernels(len(values), MOST_KERNELS)
        self.console, self.stop = Console(speaks=False), StopRequest()
        with redirect_stdout(sys.stderr):
            self.accelerator = start.start([], recipes[0].run.out, recipes[0].run.device)
            self.dtype = start.agreed_dtype(recipes[0], self.accelerator)
            inputs: list[RunInputs] = []
            for recipe in recipes:
                inputs.append(read_inputs_on_all_ranks(recipe, self.accelerator, inputs))
            model = load_base(recipes[0], inputs[0].base, self.dtype, self.accelerator.device)
            shared = Shared(partial(with_the_same_weights, model), self.stop, 0)
            self._alone, self._together = ([self._load(one, shared) for one in inputs] for _ in range(2))
        members = [Member(run.inputs.recipe, self.console, run.inputs, run=run) for run in self._together]
        self.room = room_of(members, self.accelerator)
        self.block = inputs[0].corpus.train.packing.block_size

    def _load(self, inputs: RunInputs, shared: Shared) -> Run:
        Path(inputs.recipe.run.out).mkdir(parents=True, exist_ok=True)
        run = load_run(inputs, self.accelerator, self.dtype, self.console, shared=shared)
        run.metrics.close()  # steps alone write nothing
        return run

    def together(self) -> list[StepResult]:
        """The next step of every adapter, in forwards that they share."""
        return self._taken(self._together, True)

    def alone(self) -> list[StepResult]:
        """The next step of every adapter, one after another."""
        return [done for run in self._alone for done in self._taken([run], False)]

    def _taken(self, runs: Sequence[Run], shares: bool) -> list[StepResult]:
        learners, room = [run.learner for run in runs], self.room if shares else None
        found = []
        for run, done in zip(
            runs, steps_together(learners, self.accelerator, self.stop, self.console, room), strict=True
        ):
            if isinstance(done, CheckFailed):
                raise done
            run.state.step += 1
            found.append(done)
        return found

    def difference(self, steps: int) -> float:
        """The largest relative difference of a loss in so many steps, those after each other's updates included."""
        pairs = [pair for _ in range(steps) for pair in zip(self.together(), self.alone(), strict=True)]
        return max(abs(ours.loss - solo.loss) / solo.loss for ours, solo in pairs)

    def rate(self, together: bool, tokens: int) -> float:
        """Tokens a second, on a CPU of its time, of whole steps that learn from so many tokens at least."""
        learnt, began = 0, self._clock()
        while learnt < tokens:
            learnt += sum(done.tokens for done in (self.together() if together else self.alone()))
        return learnt / (self._clock() - began)

    def _clock(self) -> float:
        if self.accelerator.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.accelerator.device)
        return time.perf_counter()

    def settings(self) -> dict[str, Any]:
        """As they are printed with the figures."""
        return {"adapters": len(self._together), "blocks a forward": self.room.blocks, "block_size": self.block}


def recipes_of(values: dict[str, Any], adapters: int) -> list[dict[str, Any]]:
    """The recipe with so many seeds, each its own directory."""
    runs = [values["run"] | {"out": f"{values['run']['out']}/{n}", "seed": n} for n in range(adapters)]
    return [values | {"run": run} for run in runs]


def read(values: Sequence[dict[str, Any]], overrides: Sequence[str] = ()) -> list[Recipe]:
    """Recipes as the trainer takes them."""
    return [recipe_from(each, [*overrides]) for each in values]
