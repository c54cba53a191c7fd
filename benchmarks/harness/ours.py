"""peftune as a contestant, and its gradients. All that benchmarks know of the trainer's inside is in `TrainingRun`.

The gate: the gradient of every adapter matrix, packed by peftune, against PEFT document by document in float32.

Both start from the same base and the same adapter values (B drawn at random too: at zero, A would have no gradient).
peftune's gradient is what its own step hands to the optimizer. The figure is the largest relative error
|packed - reference| / |reference| (Frobenius norms) over all adapter matrices, in fp32 and in bf16.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from benchmarks.harness.memory import Clock
from benchmarks.harness.options import Setup
from benchmarks.harness.report import number
from benchmarks.harness.workers import Channel, Contestant
from peftune.config.recipe import recipe_from
from peftune.console import Console
from peftune.data.batches import blocks_of_step
from peftune.model.load import NAME_OF, footprint, with_dropout
from peftune.model.lora import peft_config, quiet_peft
from peftune.training.distributed import start
from peftune.training.distributed.signals import StopRequest
from peftune.training.inputs import read_inputs_on_all_ranks
from peftune.training.loading import Run, load_run
from peftune.training.step import train_step

LIMITS = {"fp32": 1e-5, "bf16": 2e-2}


class TrainingRun:
    """The optimizer steps of a recipe, one after the other; `run` is as the trainer has it before the first."""

    def __init__(self, values: dict[str, Any], overrides: list[str]) -> None:
        self.recipe = recipe_from(values, overrides)
        with redirect_stdout(sys.stderr):
            accelerator = start.start([], self.recipe.run.out)
            dtype = start.agreed_dtype(self.recipe, accelerator)
            inputs = read_inputs_on_all_ranks(self.recipe, accelerator)
            Path(self.recipe.run.out).mkdir(parents=True, exist_ok=True)
            self.run: Run = load_run(inputs, accelerator, dtype, Console(speaks=False))
        self.base, self.train = inputs.base, inputs.corpus.train
        self.parameters: dict[str, torch.nn.Parameter] = self.run.adapted.trainable()

    def step(self) -> int:
        """Take the next step; real tokens it learnt from. The step ends with a host sync (its gradient norm)."""
        r = self.run
        result = train_step(r.learner, r.accelerator, StopRequest(), r.console)
        r.state.step += 1
        return result.tokens

    def gradients_of_a_step(self) -> dict[str, torch.Tensor]:
        """What the next step hands to the optimizer, by name, in float64; nothing is updated."""
        caught: dict[str, torch.Tensor] = {}

        def catch(gradient: Any, divisor: float, rate: float, summed: bool) -> torch.Tensor:
            caught.update({n: v.cpu().double() / divisor for n, v in zip(self.parameters, gradient.views, strict=True)})
            return torch.zeros(())

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
    channel.send(settings=training.settings(), base_bytes=footprint(training.run.adapted.model).held)
    going = clock.begin()
    while going:
        clock.tokens += training.step()
        going = clock.stepped()


def gradient_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round for both precisions; the value is the larger share of its limit."""
    for _ in channel.rounds(blocks=job["recipe"]["batch"]["global_size"]):
        with redirect_stdout(sys.stderr):
            found = {precision: errors(job, precision) for precision in LIMITS}
        worst = {precision: max(each.values()) for precision, each in found.items()}
        channel.send(value=max(worst[p] / LIMITS[p] for p in worst), worst=worst, matrices=found)


def errors(job: dict[str, Any], precision: str) -> dict[str, float]:
    """Relative error of each adapter matrix by name."""
    out = f"run.out={job['recipe']['run']['out']}-{precision}"
    run = TrainingRun(job["recipe"], [*job["overrides"], f"run.precision={precision}", "optim.clip=null", out])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    values = {name: parameter.detach().cpu().clone() for name, parameter in run.parameters.items()}
    found, expected = run.gradients_of_a_step(), reference(run, values)
    return {n: float((found[n] - expected[n]).norm() / expected[n].norm()) for n in values}


def reference(run: TrainingRun, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over the same step's tokens through PEFT, a document at a time, float32 on the CPU."""
    config = with_dropout(run.base.config, 0.0)
    config._attn_implementation = "eager"
    base = GPT2LMHeadModel.from_pretrained(run.base.directory, config=config, dtype=torch.float32)
    with quiet_peft():
        model = get_peft_model(base, peft_config(base, run.recipe.lora)).train()
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].data.copy_(value)
    tokens = 0
    for ids, scored in run.documents_of_first_step():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits[scored[1:]], ids[1:][scored[1:]], reduction="sum").backward()
        tokens += int(scored[1:].sum())
    return {name: parameters[name].grad.double() / tokens for name in values}  # type: ignore[union-attr]


def gradient_contestant(setup: Setup) -> Contestant:
    """The comparison on this command's base, documents, adapter and recipe keys."""
    recipe = setup.recipe("gate", batch={"global_size": setup.arguments.gate_blocks})
    job = {"recipe": recipe, "overrides": setup.arguments.ours}
    return Contestant("gradients", "benchmarks.harness.ours:gradient_worker", job, "of the limit", must_run=True)


def gate(setup: Setup) -> dict[str, Any]:
    """The gate: what was found, or SystemExit where a gradient is not what PEFT computes."""
    if not setup.arguments.gate_blocks:
        return {"skipped": "--gate-blocks 0"}
    print("gate: gradients against PEFT, document by document", file=sys.stderr)
    judge = gradient_contestant(setup)
    setup.interleave([judge], rounds=1, warmup=0)
    worst = judge.rounds[0]["worst"]
    found = {f"{p} gradients": f"{number(worst[p])} (limit {LIMITS[p]:g})" for p in worst}
    if judge.rounds[0]["value"] > 1:
        raise SystemExit(f"the gate is closed, nothing was timed: {found}")
    return found
