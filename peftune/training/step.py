"""One optimizer step, the same lines on every rank and under every engine.

Each rank adds up the gradient of summed nats over its micro-batches; then all ranks sum, divide by the step's scored
tokens, clip and update, which is the engine's part (`engine.ReplicatedStrategy`, `distributed.ShardedStrategy`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from peftune.data.sampler import blocks_of_step, share_of
from peftune.errors import CheckFailed, UserError
from peftune.training import optimizer
from peftune.training.distributed.collectives import all_gather, all_reduce_sum, lockstep_batches
from peftune.training.distributed.signals import StopRequest
from peftune.training.memory import is_out_of_memory
from peftune.training.precision import next_loss_scale
from peftune.training.setup import Session

Result = TypeVar("Result")


class StopNow(Exception):
    """A signal asked to stop; nothing of the step in progress counts."""


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step: mean loss in nats per token before the update, gradient norm before clipping, its tokens."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int


def train_step(session: Session, stop: StopRequest) -> StepResult:
    """Take optimizer step number `session.state.step`; neither loss nor update depends on micro-batches or ranks.

    Raises StopNow, on all ranks, where a signal came to one; CheckFailed, before the update, for broken numbers.
    """
    state, optim, accelerator = session.state, session.recipe.optim, session.accelerator
    train = session.source.corpus.train
    blocks = blocks_of_step(state.step, len(train), session.recipe.batch.global_size, session.recipe.run.seed)
    tokens = train.tokens_of(blocks)
    while True:
        nats = in_fitting_micro_batches(session, lambda: _accumulate(session, blocks, stop))
        largest = session.gradient.largest()
        smaller = float(session.micro_size < state.micro_size)
        told = all_reduce_sum(accelerator, nats, largest, float(stop.name is not None), smaller)
        nats, largest, stopped, smaller = told
        if stopped:
            raise StopNow
        if smaller:
            state.micro_size = session.micro_size = min(all_gather(accelerator, session.micro_size))
        if math.isfinite(largest) or state.loss_scale <= 1.0:
            break
        state.loss_scale /= 2  # fp16 overflowed: the same step again
    _refuse_broken_numbers(state.step, nats / tokens, largest)
    rate = optimizer.lr_at(state.step, session.source.total_steps, optim)
    norm = session.engine.update(session.gradient, tokens * state.loss_scale, rate)
    if session.precision == "fp16":
        state.loss_scale = next_loss_scale(state.loss_scale, state.step)
    return StepResult(nats / tokens, norm, rate, tokens)


def _accumulate(session: Session, blocks: np.ndarray, stop: StopRequest) -> float:
    """This rank's share of a step: its gradient into `session.gradient`, its summed nats. Nothing travels here."""
    state, recipe, accelerator = session.state, session.recipe, session.accelerator
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = share_of(blocks, state.micro_size, rank, ranks)
    torch.manual_seed(draw_seed(recipe.run.seed, state.step, rank))
    session.gradient.clear()
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    batches = session.source.corpus.train.batches(mine, session.micro_size, recipe.data.packing)
    for batch in lockstep_batches(accelerator, session.engine.forward_is_collective, batches, stop):
        loss = session.score(batch)
        session.gradient.add(loss * state.loss_scale)
        nats += loss.detach()
    return float(nats)  # host sync here


def in_fitting_micro_batches(session: Session, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns; when memory runs out, micro-batches are halved and it starts from its beginning."""
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        _take_smaller_micro_batches(session)


def draw_seed(seed: int, step: int, rank: int) -> int:
    """Seed of every random draw (dropout, noise) within one step on one rank; nothing else need be remembered."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**63 - 1)


def _refuse_broken_numbers(step: int, loss: float, largest: float) -> None:
    """Stop before the update; `largest` is the sum over ranks of the largest element of each rank's gradient."""
    if not math.isfinite(loss) or not math.isfinite(largest):
        raise CheckFailed(
            f"step {step + 1}: loss {loss}, largest gradient {largest}; the adapter was not updated. "
            "Lower optim.lr, or resume from the last checkpoint with run.precision=fp32"
        )
    if largest == 0.0:
        raise CheckFailed(f"step {step + 1}: no gradient reaches the adapter (all zero), so it would never learn")


def _take_smaller_micro_batches(session: Session) -> None:
    """Halve this rank's micro-batch after memory ran out; the other ranks need not know."""
    size = session.micro_size
    if session.recipe.batch.micro_size != "auto" or size == 1:
        raise UserError(
            f"out of memory with micro_size {size} blocks of {session.source.corpus.train.packing.block_size} tokens; "
            "use batch.micro_size=auto, run.checkpointing=true or a smaller data.block_size"
        ) from None
    if session.engine.forward_is_collective:
        raise UserError(
            f"out of memory with micro_size {size}; ranks of ZeRO-3 go in step, give batch.micro_size={size // 2}"
        )
    session.micro_size = size // 2
    session.display.say(f"out of memory: micro-batches of {size // 2} blocks from here on (the result stays the same)")
    if session.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
