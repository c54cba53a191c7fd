"""Evaluation and samples while training: exact over ranks, recorded, and what early stopping looks at."""

from __future__ import annotations

import torch

from peftune.data.batches import Blocks
from peftune.inference.generate import generate_with_transformers
from peftune.inference.perplexity import Score
from peftune.inference.settings import GenerationSettings
from peftune.training.distributed.collectives import all_reduce_sum, lockstep_batches
from peftune.training.distributed.signals import StopRequest
from peftune.training.setup import Session
from peftune.training.step import StopNow, in_fitting_micro_batches

SAMPLE_TOKENS = 80


def evaluate_domains(session: Session, stop: StopRequest) -> dict[str, Score]:
    """Score every domain, each block on one rank; raises StopNow, on all ranks, where a signal came to one."""
    return {name: _score(session, name, blocks, stop) for name, blocks in session.source.corpus.domains.items()}


def _score(session: Session, name: str, blocks: Blocks, stop: StopRequest) -> Score:
    accelerator, progress, engine = session.accelerator, session.display.progress, session.engine
    mine = range(accelerator.process_index, len(blocks), accelerator.num_processes)
    task = progress.add_task(f"evaluating {name}", total=len(mine), note="")

    def attempt() -> float:
        progress.reset(task)
        nats = 0.0
        for batch in lockstep_batches(
            accelerator, engine.forward_is_collective, blocks.batches(mine, session.micro_size), stop
        ):
            nats += float(session.score(batch))
            progress.advance(task, len(batch.ids))
        return nats

    engine.module.eval()
    try:
        with torch.no_grad():
            nats = in_fitting_micro_batches(session, attempt)
    finally:
        engine.module.train()
        progress.remove_task(task)
    nats, stopped = all_reduce_sum(accelerator, nats, float(stop.name is not None))
    if stopped:
        raise StopNow
    return Score(nats, blocks.tokens(), blocks.text_bytes())


def record(session: Session, scores: dict[str, Score]) -> None:
    """Write the scores to the metrics and tell the person."""
    step = session.state.step
    for domain, score in scores.items():
        session.records.write("eval", step=step, domain=domain, **score.figures(), tokens=score.tokens)
    told = "  ".join(f"{d}: loss {s.loss:.4f}, perplexity {s.figures()['perplexity']:.2f}" for d, s in scores.items())
    if told:
        session.display.say(f"step {step}/{session.source.total_steps}  {told}")


def improves(session: Session, scores: dict[str, Score]) -> bool:
    """Whether the loss over all domains together is the lowest so far; keeps count of evaluations without gain."""
    state = session.state
    state.evaluated_step = state.step
    if not scores:
        return False
    loss = sum(s.nats for s in scores.values()) / sum(s.tokens for s in scores.values())
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
        return True
    state.evaluations_without_gain += 1
    return False


def sample(session: Session) -> None:
    """Continue the recipe's prompts greedily; into the metrics and before the person's eyes."""
    prompts = session.recipe.run.samples
    if not prompts or not session.accelerator.is_main_process:
        return
    model = session.adapted.model
    settings = GenerationSettings(max_new_tokens=SAMPLE_TOKENS, temperature=0.0)
    session.engine.module.eval()
    with session.autocast():
        generations = generate_with_transformers(model, session.source.base.tokenizer, prompts, settings)
    session.engine.module.train()
    for made in generations:
        session.records.write("sample", step=session.state.step, prompt=made.prompt, text=made.text)
        session.display.say(f"  sample {made.prompt!r} → {made.text!r}")
