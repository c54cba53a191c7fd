"""What the adapter writes so far: the recipe's prompts, continued while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from peftune.inference.generate import generate_with_transformers
from peftune.inference.request import Generation
from peftune.inference.settings import GenerationSettings
from peftune.training.distributed.collectives import all_reduce_sum
from peftune.training.distributed.signals import StopNow, StopRequest
from peftune.training.step import ForwardFn

SAMPLE_TOKENS = 80


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
    if not prompts:
        return made
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
