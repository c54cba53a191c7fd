"""How an adapter does while it trains: the loss of a domain, and the recipe's prompts continued."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from peftune.console import Console
from peftune.data.batches import Blocks
from peftune.inference.generate import generate_with_transformers
from peftune.inference.perplexity import Score
from peftune.inference.request import Generation
from peftune.inference.settings import GenerationSettings
from peftune.training.distributed.collectives import all_reduce_sum, lockstep_batches
from peftune.training.distributed.signals import StopNow, StopRequest
from peftune.training.step import ForwardFn, in_fitting_micro_batches

SAMPLE_TOKENS = 80


def evaluate_domain(
    name: str, blocks: Blocks, forward: ForwardFn, accelerator: Accelerator, stop: StopRequest, console: Console
) -> Score:
    """Score a domain, each block on one rank; raises StopNow, on all ranks, where a signal came to one."""
    mine = range(accelerator.process_index, len(blocks), accelerator.num_processes)
    task = console.progress.add_task(f"evaluating {name}", total=len(mine), note="")

    def attempt() -> float:
        console.progress.reset(task)
        nats = torch.zeros((), dtype=torch.float64, device=forward.device)
        batches = blocks.batches(mine, forward.micro_size)
        with suppress(StopNow), stop.at_once(not forward.is_collective), forward.between_updates():
            for batch in lockstep_batches(accelerator, forward.is_collective, batches, stop):
                nats += forward(batch)
                console.progress.advance(task, len(batch.ids))
        return float(nats)  # host sync here

    forward.module.eval()
    try:
        with torch.no_grad():
            nats = in_fitting_micro_batches(attempt, [forward], console)
    finally:
        forward.module.train()
        console.progress.remove_task(task)
    nats, stopped = all_reduce_sum(accelerator, nats, float(stop.name is not None))
    if stopped:
        raise StopNow
    return Score(nats, blocks.tokens(), blocks.text_bytes())


def continue_prompts(
    prompts: Sequence[str],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    parse: bool,
    forward: ForwardFn,
    accelerator: Accelerator,
    stop: StopRequest,
) -> list[Generation]:
    """Greedy continuations, with `parse` of prompts whose special tokens are tokens.

    On the first rank; StopNow, on all ranks, where a signal came to one.
    """
    made: list[Generation] = []
    if accelerator.is_main_process:
        settings = GenerationSettings(max_new_tokens=SAMPLE_TOKENS, temperature=0.0)
        forward.module.eval()
        with suppress(StopNow), stop.at_once(), forward.autocast():
            made = generate_with_transformers(model, tokenizer, prompts, settings, parse=parse)
        forward.module.train()
    (stopped,) = all_reduce_sum(accelerator, float(stop.name is not None))
    if stopped:
        raise StopNow
    return made
