"""One optimizer step, and the evaluation of one domain: the same lines on every rank, under DDP and under ZeRO.

Each rank adds up the gradient of summed nats over its micro-batches; then all ranks sum, divide by the step's scored
tokens, clip and update, which the update strategy does (`optimizer.ReplicatedStrategy`, `zero.ShardedStrategy`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from peftune.config.recipe import Recipe
from peftune.console import Console
from peftune.data.batches import Batch, Blocks, blocks_of_step, share_of
from peftune.device import is_out_of_memory
from peftune.errors import CheckFailed, UserError
from peftune.inference.perplexity import Score
from peftune.model.lora import Adapted
from peftune.model.train.forward import TrainGPT2, reason_against, train_forward
from peftune.training.checkpoint import State
from peftune.training.distributed.collectives import all_gather, all_reduce_sum, lockstep_batches
from peftune.training.distributed.signals import StopNow, StopRequest
from peftune.training.inputs import RunInputs
from peftune.training.optimizer import Gradient, UpdateStrategy, lr_at, next_loss_scale

Result = TypeVar("Result")

_WORTH_COMPILING = {"cpu": 2e14, "cuda": 2e16}  # FLOP in ten minutes or so


class NotFinite(CheckFailed):
    """Loss or gradient of a step is infinite or no number; the adapter was not updated."""


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step: mean loss in nats per token before the update, gradient norm before clipping, its tokens."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int


@dataclass
class ForwardFn:
    """Scores batches: by the fast forward where it computes the same, else by `module`; `description` says why."""

    module: nn.Module
    fast: TrainGPT2 | None
    description: str
    dtype: torch.dtype
    device: torch.device
    is_collective: bool
    """Whether it needs the other ranks, so that all must run equally many (ZeRO-3)."""
    micro_size: int
    """Blocks per forward on this rank: `state.micro_size`, or less once memory ran out here."""
    may_shrink: bool
    """Whether `micro_size` may be halved when memory runs out: `batch.micro_size` is auto."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Summed nats of a batch (float64 scalar), differentiable in the adapter."""
        if self.fast is not None:
            return self.fast(batch.ids, batch.positions, batch.targets, batch.segments)
        moved = batch.to(self.device)
        with self.autocast():
            return self.module(moved.ids, moved.positions, moved.targets, moved.segments)  # type: ignore[no-any-return]

    def between_updates(self) -> AbstractContextManager[None]:
        """Inside, the adapter does not change (`TrainGPT2.between_updates`)."""
        return self.fast.between_updates() if self.fast is not None else nullcontext()

    def autocast(self) -> torch.autocast:
        """Matrix products in the run's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_forward(
    adapted: Adapted, recipe: Recipe, dtype: torch.dtype, sharded: bool, tokens: int, console: Console
) -> tuple[TrainGPT2 | None, str]:
    """The fast forward wherever it computes the same, or None, and a description; `sharded` is a base under ZeRO-3.

    `tokens` is what the run learns from, at most: whether compiling repays.
    """
    reason = "run.fast is false" if not recipe.run.fast else "ZeRO-3 shards the base" if sharded else None
    if reason := reason or reason_against(adapted):
        return None, f"steps by Transformers and PEFT ({reason})"
    optim, worth = recipe.optim, recipe.run.compile and _is_worth_compiling(adapted, tokens)
    if worth:
        console.say("compiling elementwise operations: half a minute the first time, seconds afterwards")
    fast = train_forward(adapted, dtype, optim.neftune, optim.label_smoothing, recipe.run.checkpointing, worth)
    too_short = "not compiled: the run is too short to repay it" if recipe.run.compile and not worth else ""
    compiled = fast.elementwise.description or too_short
    return fast, f"fast steps ({', '.join(filter(None, (fast.kernel.name, compiled)))})"


def _is_worth_compiling(adapted: Adapted, tokens: int) -> bool:
    """Whether a run takes many minutes: of its time compiling saves a few percent, and takes half a minute.

    Decided by the recipe and the data alone, so that a run that is resumed decides as it did before.
    """
    core: Any = adapted.model.get_base_model()
    elements = 12 * core.config.n_layer * core.config.n_embd**2 + core.lm_head.weight.numel()
    return bool(4.0 * elements * tokens > _WORTH_COMPILING.get(core.device.type, 0.0))


def train_step(
    inputs: RunInputs,
    state: State,
    forward: ForwardFn,
    gradient: Gradient,
    strategy: UpdateStrategy,
    accelerator: Accelerator,
    stop: StopRequest,
    console: Console,
) -> StepResult:
    """Take optimizer step number `state.step`; neither loss nor update depends on micro-batches or ranks.

    Raises StopNow, on all ranks, where a signal came to one; before the update NotFinite for broken numbers, and
    CheckFailed where no gradient comes.
    """
    recipe, train = inputs.recipe, inputs.corpus.train
    rank, ranks = accelerator.process_index, accelerator.num_processes
    blocks = blocks_of_step(state.step, len(train), recipe.batch.global_size, recipe.run.seed)
    tokens = train.tokens_of(blocks)
    rate = lr_at(state.step, inputs.total_steps, recipe.optim)

    def accumulate() -> list[float]:  # this rank's micro-batches; nothing is communicated here but under ZeRO-3
        mine = share_of(blocks, state.micro_size, rank, ranks)
        torch.manual_seed(draw_seed(recipe.run.seed, state.step, rank))
        gradient.flat.zero_()
        nats = torch.zeros((), dtype=torch.float64, device=forward.device)
        batches = train.batches(mine, forward.micro_size, recipe.data.packing)
        with suppress(StopNow), stop.at_once(not forward.is_collective), forward.between_updates():
            for batch in lockstep_batches(accelerator, forward.is_collective, batches, stop):
                loss = forward(batch)
                gradient.add(loss * state.loss_scale)
                nats += loss.detach()
        found: list[float] = torch.stack([nats, gradient.largest().double()]).tolist()  # host sync here
        return found

    while True:
        nats, largest = _in_fitting_micro_batches(accumulate, forward, console)
        smaller = float(forward.micro_size < state.micro_size)
        nats, largest, stopped, smaller = all_reduce_sum(
            accelerator, nats, largest, float(stop.name is not None), smaller
        )
        if stopped:
            raise StopNow
        if smaller:
            state.micro_size = forward.micro_size = min(all_gather(accelerator, forward.micro_size))
        if math.isfinite(largest) or state.loss_scale <= 1.0:
            break
        state.loss_scale /= 2  # fp16 overflowed: the same step again
    _refuse_broken_numbers(state.step, nats / tokens, largest)
    norm = strategy.update(gradient, tokens * state.loss_scale, rate)
    if forward.dtype == torch.float16:
        state.loss_scale = next_loss_scale(state.loss_scale, state.step)
    return StepResult(nats / tokens, norm, rate, tokens)


def draw_seed(seed: int, step: int, rank: int) -> int:
    """Seed of every random draw (dropout, noise) within one step on one rank; nothing else need be remembered."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**63 - 1)


def _refuse_broken_numbers(step: int, loss: float, largest: float) -> None:
    """Stop before the update; `largest` is the sum over ranks of the largest element of each rank's gradient."""
    if not math.isfinite(loss) or not math.isfinite(largest):
        raise NotFinite(f"step {step + 1}: loss {loss}, largest gradient {largest}; the adapter was not updated")
    if largest == 0.0:
        raise CheckFailed(f"step {step + 1}: no gradient reaches the adapter (all zero), so it would never learn")


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
            nats = _in_fitting_micro_batches(attempt, forward, console)
    finally:
        forward.module.train()
        console.progress.remove_task(task)
    nats, stopped = all_reduce_sum(accelerator, nats, float(stop.name is not None))
    if stopped:
        raise StopNow
    return Score(nats, blocks.tokens(), blocks.text_bytes())


def _in_fitting_micro_batches(attempt: Callable[[], Result], forward: ForwardFn, console: Console) -> Result:
    """What `attempt` returns; when memory runs out, this rank's micro-batches are halved and it starts again.

    The other ranks need not know. UserError where the recipe fixes the size, or one block is too much.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        size = forward.micro_size
        if forward.is_collective and forward.may_shrink and size > 1:
            advice = f"ZeRO-3 needs equally many micro-batches on all ranks, give batch.micro_size={size // 2}"
            raise UserError(f"out of memory with micro_size {size}; {advice}")
        if not forward.may_shrink or size == 1:
            advice = "use batch.micro_size=auto, run.checkpointing=true or a smaller data.block_size"
            raise UserError(f"out of memory with micro_size {size}; {advice}")
        forward.micro_size = size // 2
        console.say(f"out of memory: micro-batches of {size // 2} blocks from here on (the result stays the same)")
        if forward.device.type == "cuda":
            torch.cuda.empty_cache()
