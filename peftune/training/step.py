"""One optimizer step: accumulate summed nats over micro-batches, divide by the step's scored tokens, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from peftune.data.order import blocks_of_step
from peftune.errors import CheckFailed, UserError
from peftune.training import optimizer
from peftune.training.distributed import is_out_of_memory, summed_over_ranks
from peftune.training.session import Session
from peftune.training.signals import StopRequest

Result = TypeVar("Result")


class StopNow(Exception):
    """A signal asked to stop; nothing of the step in progress counts."""


@dataclass(frozen=True)
class Learnt:
    """Outcome of a step: mean loss in nats per token before the update, gradient norm before clipping, its tokens."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int


def learn(session: Session, stop: StopRequest) -> Learnt:
    """Take optimizer step number `session.state.step`; the loss and the update do not depend on micro-batches."""
    return in_fitting_micro_batches(session, lambda: _attempt(session, stop))


def in_fitting_micro_batches(session: Session, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns; when memory runs out, micro-batches are halved and it starts from its beginning."""
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        _take_smaller_micro_batches(session)


def _attempt(session: Session, stop: StopRequest) -> Learnt:
    session.optimizer.zero_grad(set_to_none=True)
    state, recipe, accelerator = session.state, session.recipe, session.accelerator
    train = session.source.corpus.train
    blocks = blocks_of_step(state.step, len(train), recipe.batch.global_size, recipe.run.seed)
    tokens = train.tokens_of(blocks)
    mine = blocks[accelerator.process_index :: accelerator.num_processes]
    torch.manual_seed(draw_seed(recipe.run.seed, state.step, accelerator.process_index))
    batches = list(train.batches(mine, state.micro_size, recipe.data.packing))
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        if stop.name is not None:
            raise StopNow
        moved = batch.to(accelerator.device)
        last = number == len(batches)
        with nullcontext() if last else accelerator.no_sync(session.scorer):
            loss = session.scorer(moved.ids, moved.positions, moved.targets, moved.segments)
            accelerator.backward(loss * (accelerator.num_processes / tokens))  # ranks are averaged: undo it
        nats += loss.detach()
    mean = summed_over_ranks(accelerator, float(nats))[0] / tokens  # host sync here
    return _update(session, mean, tokens)


def _update(session: Session, loss: float, tokens: int) -> Learnt:
    state, optim = session.state, session.recipe.optim
    rate = optimizer.lr_at(state.step, session.source.total_steps, optim)
    optimizer.set_rate(session.optimizer, rate)
    norm = float(session.accelerator.clip_grad_norm_(session.parameters.values(), optim.clip or math.inf))
    _refuse_broken_numbers(state.step, loss, norm, scaled=session.accelerator.scaler is not None)
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    return Learnt(loss, norm, rate, tokens)


def draw_seed(seed: int, step: int, rank: int) -> int:
    """Seed of every random draw (dropout, noise) within one step on one rank; nothing else need be remembered."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**63 - 1)


def _refuse_broken_numbers(step: int, loss: float, norm: float, scaled: bool) -> None:
    """Stop before the update; with fp16 loss scaling an overflowing gradient is expected and skipped by the scaler."""
    if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
        raise CheckFailed(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; the adapter was not updated. "
            "Lower optim.lr, or resume from the last checkpoint with run.precision=fp32"
        )
    if norm == 0.0:
        raise CheckFailed(f"step {step + 1}: no gradient reaches the adapter (norm 0), so it would never learn")


def _take_smaller_micro_batches(session: Session) -> None:
    """Halve the micro-batch after memory ran out, and let go of what the failed attempt left."""
    session.optimizer.zero_grad(set_to_none=True)
    size = session.state.micro_size
    if session.recipe.batch.micro_size != "auto" or size == 1:
        raise UserError(
            f"out of memory with micro_size {size} blocks of {session.source.corpus.train.packing.block_size} tokens; "
            "use batch.micro_size=auto, run.checkpointing=true or a smaller data.block_size"
        ) from None
    session.state.micro_size = size // 2
    session.display.say(f"out of memory: micro-batches of {size // 2} blocks from here on (the result stays the same)")
    if session.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
