"""Evaluation and samples while training: exact over ranks, recorded, and what early stopping looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from peftune.console import Console
from peftune.data.batches import Blocks
from peftune.inference.generate import generate_with_transformers
from peftune.inference.perplexity import Score
from peftune.inference.settings import GenerationSettings
from peftune.training.distributed.collectives import all_reduce_sum, lockstep_batches
from peftune.training.distributed.signals import StopRequest
from peftune.training.inputs import RunInputs
from peftune.training.metrics import MetricsLog
from peftune.training.optimizer import UpdateStrategy
from peftune.training.step import ForwardFn, StopNow, in_fitting_micro_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLE_TOKENS = 80


def evaluate_domain(
    name: str,
    blocks: Blocks,
    inputs: RunInputs,
    forward: ForwardFn,
    strategy: UpdateStrategy,
    accelerator: Accelerator,
    stop: StopRequest,
    console: Console,
) -> Score:
    """Score a domain, each block on one rank; raises StopNow, on all ranks, where a signal came to one."""
    mine = range(accelerator.process_index, len(blocks), accelerator.num_processes)
    task = console.progress.add_task(f"evaluating {name}", total=len(mine), note="")

    def attempt() -> float:
        console.progress.reset(task)
        nats = 0.0
        batches = blocks.batches(mine, forward.micro_size)
        for batch in lockstep_batches(accelerator, strategy.forward_is_collective, batches, stop):
            nats += float(forward(batch))
            console.progress.advance(task, len(batch.ids))
        return nats

    forward.module.eval()
    try:
        with torch.no_grad():
            nats = in_fitting_micro_batches(attempt, inputs, forward, strategy, console)
    finally:
        forward.module.train()
        console.progress.remove_task(task)
    nats, stopped = all_reduce_sum(accelerator, nats, float(stop.name is not None))
    if stopped:
        raise StopNow
    return Score(nats, blocks.tokens(), blocks.text_bytes())


def report_scores(scores: dict[str, Score], step: int, total_steps: int, metrics: MetricsLog, console: Console) -> None:
    """Write the scores to the metrics and to the screen."""
    for domain, score in scores.items():
        metrics.write("eval", step=step, domain=domain, **score.figures(), tokens=score.tokens)
    line = "  ".join(f"{d}: loss {s.loss:.4f}, perplexity {s.figures()['perplexity']:.2f}" for d, s in scores.items())
    if line:
        console.say(f"step {step}/{total_steps}  {line}")


def write_samples(
    inputs: RunInputs, model: PeftModel, forward: ForwardFn, step: int, metrics: MetricsLog, console: Console
) -> None:
    """Continue the recipe's prompts greedily; into the metrics and onto the screen."""
    settings = GenerationSettings(max_new_tokens=SAMPLE_TOKENS, temperature=0.0)
    forward.module.eval()
    with forward.autocast():
        generations = generate_with_transformers(model, inputs.base.tokenizer, inputs.recipe.run.samples, settings)
    forward.module.train()
    for made in generations:
        metrics.write("sample", step=step, prompt=made.prompt, text=made.text)
        console.say(f"  sample {made.prompt!r} → {made.text!r}")
