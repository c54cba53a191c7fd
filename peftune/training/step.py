"""One optimizer step, of one adapter or of several side by side: the same lines on every rank, under DDP and ZeRO.

Each rank adds up the gradient of summed nats over its micro-batches; then all ranks sum, divide by the step's scored
tokens, clip and update, which the update strategy does (`optimizer.ReplicatedStrategy`, `zero.ShardedStrategy`).
Adapters that learn side by side share forwards and nothing else: each has its own blocks, tokens, rate and draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from peftune.console import Console
from peftune.data.batches import Batch, blocks_of_step, share_of
from peftune.device import is_out_of_memory
from peftune.errors import CheckFailed, UserError
from peftune.model.train.forward import TrainGPT2
from peftune.training.checkpoint import State
from peftune.training.distributed.collectives import all_gather, all_reduce_sum, lockstep_batches
from peftune.training.distributed.signals import StopNow, StopRequest
from peftune.training.inputs import RunInputs
from peftune.training.optimizer import Gradient, UpdateStrategy, lr_at, next_loss_scale

Result = TypeVar("Result")


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


@dataclass(frozen=True)
class Learner:
    """An adapter as a step sees it."""

    inputs: RunInputs
    state: State
    forward: ForwardFn
    gradient: Gradient
    strategy: UpdateStrategy


class Room(Protocol):
    """What adapters share that learn side by side."""

    blocks: int
    """Of one forward on this rank, from all of them; less once memory ran out here."""
    gradient: torch.Tensor
    """The buffer of which each adapter's gradient is a part."""

    def accumulate(self, taking: Sequence[Taking], accelerator: Accelerator, stop: StopRequest) -> list[list[float]]:
        """Add up the gradients of this rank's micro-batches; of each adapter its nats and largest element."""


def train_step(learner: Learner, accelerator: Accelerator, stop: StopRequest, console: Console) -> StepResult:
    """Take optimizer step number `state.step`; neither loss nor update depends on micro-batches or ranks.

    Raises StopNow, on all ranks, where a signal came to one; before the update NotFinite for broken numbers, and
    CheckFailed where no gradient comes.
    """
    (done,) = steps_together([learner], accelerator, stop, console)
    if isinstance(done, CheckFailed):
        raise done
    return done


def steps_together(
    learners: Sequence[Learner], accelerator: Accelerator, stop: StopRequest, console: Console, room: Room | None = None
) -> list[StepResult | CheckFailed]:
    """Take the next step of each adapter, each by its own number, or find what `train_step` would raise of it alone.

    With `room` they share forwards. To rounding each step is what it would be alone. Raises StopNow as `train_step`.
    """
    taking = [Taking.of(learner) for learner in learners]
    waiting, losses, largest = [*range(len(taking))], [0.0] * len(taking), [0.0] * len(taking)
    while waiting:
        now = [taking[number] for number in waiting]
        accumulate = partial((room.accumulate if room else _accumulate), now, accelerator, stop)
        found = in_fitting_micro_batches(accumulate, [t.forward for t in now], console, room)
        smaller = float(any(t.forward.micro_size < t.state.micro_size for t in now))
        flat = [value for pair in found for value in pair]
        *flat, stopped, smaller = all_reduce_sum(accelerator, *flat, float(stop.name is not None), smaller)
        if stopped:
            raise StopNow
        if smaller:
            _agree_on_micro_sizes(taking, accelerator)
        again = []
        for number, nats, most in zip(waiting, flat[::2], flat[1::2], strict=True):
            losses[number], largest[number] = nats / taking[number].tokens, most
            if not math.isfinite(most) and taking[number].state.loss_scale > 1.0:
                taking[number].state.loss_scale /= 2  # fp16 overflowed: the same step again
                again.append(number)
        waiting = again
    if summed := room is not None and accelerator.num_processes > 1:
        for t in taking:
            t.learner.gradient.flat.mul_(1.0 / t.divisor)
        torch.distributed.all_reduce(room.gradient)
    norms = [t.update(loss, most, summed) for t, loss, most in zip(taking, losses, largest, strict=True)]
    sums = iter(torch.stack([norm for norm in norms if isinstance(norm, torch.Tensor)] or [torch.zeros(())]).tolist())
    return [  # host sync in the line above
        norm if isinstance(norm, CheckFailed) else StepResult(loss, next(sums), t.rate, t.tokens)
        for t, loss, norm in zip(taking, losses, norms, strict=True)
    ]


@dataclass(frozen=True)
class Taking:
    """A learner and the step that it takes: block numbers, scored tokens, rate."""

    learner: Learner
    blocks: np.ndarray
    tokens: int
    rate: float

    @staticmethod
    def of(learner: Learner) -> Taking:
        recipe, train, step = learner.inputs.recipe, learner.inputs.corpus.train, learner.state.step
        blocks = blocks_of_step(step, len(train), recipe.batch.global_size, recipe.run.seed)
        rate = lr_at(step, learner.inputs.total_steps, recipe.optim)
        return Taking(learner, blocks, train.tokens_of(blocks), rate)

    @property
    def forward(self) -> ForwardFn:
        return self.learner.forward

    @property
    def state(self) -> State:
        return self.learner.state

    @property
    def divisor(self) -> float:
        """Of the gradient: scored tokens, times what losses were scaled by."""
        return self.tokens * self.state.loss_scale

    def seed(self, rank: int) -> int:
        """Of this step's draws on a rank."""
        return draw_seed(self.learner.inputs.recipe.run.seed, self.state.step, rank)

    def batches(self, accelerator: Accelerator) -> Iterator[Batch]:
        """This rank's micro-batches."""
        mine = share_of(self.blocks, self.state.micro_size, accelerator.process_index, accelerator.num_processes)
        inputs = self.learner.inputs
        return inputs.corpus.train.batches(mine, self.forward.micro_size, inputs.recipe.data.packing)

    def update(self, loss: float, largest: float, summed: bool) -> torch.Tensor | CheckFailed:
        """Update the adapter, whose gradient is divided and `summed` over ranks or not; the norm, or what is broken."""
        learner, state = self.learner, self.state
        try:
            _refuse_broken_numbers(state.step, loss, largest)
        except CheckFailed as error:
            return error
        norm = learner.strategy.update(learner.gradient, self.divisor, self.rate, summed)
        if self.forward.dtype == torch.float16:
            state.loss_scale = next_loss_scale(state.loss_scale, state.step)
        return norm


def _accumulate(alone: Sequence[Taking], accelerator: Accelerator, stop: StopRequest) -> list[list[float]]:
    """`Room.accumulate` of one adapter. Nothing is communicated here but under ZeRO-3."""
    (taking,) = alone
    forward, gradient = taking.forward, taking.learner.gradient
    torch.manual_seed(taking.seed(accelerator.process_index))
    gradient.flat.zero_()
    nats, batches = torch.zeros((), dtype=torch.float64, device=forward.device), taking.batches(accelerator)
    with suppress(StopNow), stop.at_once(not forward.is_collective), forward.between_updates():
        for batch in lockstep_batches(accelerator, forward.is_collective, batches, stop):
            loss = forward(batch)
            gradient.add(loss * taking.state.loss_scale)
            nats += loss.detach()
    return [torch.stack([nats, gradient.largest().double()]).tolist()]  # host sync here


def _agree_on_micro_sizes(taking: Sequence[Taking], accelerator: Accelerator) -> None:
    """Where memory ran out on a rank, all take its size from the next step on; a collective."""
    sizes = all_gather(accelerator, [t.forward.micro_size for t in taking])
    for t, of_ranks in zip(taking, zip(*sizes, strict=True), strict=True):
        t.state.micro_size = t.forward.micro_size = min(of_ranks)


def draw_seed(seed: int, step: int, rank: int) -> int:
    """Seed of every random draw (dropout, noise) within one step on one rank; nothing else need be remembered."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**63 - 1)


def _refuse_broken_numbers(step: int, loss: float, largest: float) -> None:
    """Stop before the update; `largest` is the sum over ranks of the largest element of each rank's gradient."""
    if not math.isfinite(loss) or not math.isfinite(largest):
        raise NotFinite(f"step {step + 1}: loss {loss}, largest gradient {largest}; the adapter was not updated")
    if largest == 0.0:
        reason = "so it would never learn" if step == 0 else "as where optim.lr is too high"
        raise CheckFailed(f"step {step + 1}: no gradient reaches the adapter (all zero), {reason}")


def in_fitting_micro_batches(
    attempt: Callable[[], Result], forwards: Sequence[ForwardFn], console: Console, room: Room | None = None
) -> Result:
    """What `attempt` returns; when memory runs out, this rank's forwards are halved and it starts again.

    First what several adapters share, then micro-batches. The other ranks need not know. UserError where the recipe
    fixes the size, or one block is too much.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        largest = max(forwards, key=lambda forward: forward.micro_size)
        if room is not None and room.blocks > largest.micro_size:
            room.blocks = max(largest.micro_size, room.blocks // 2)
            left = f"forwards of {room.blocks} blocks together"
        else:
            left = f"micro-batches of {_halved(largest)} blocks"
        console.say(f"out of memory: {left} from here on (the result stays the same)")
        if largest.device.type == "cuda":
            torch.cuda.empty_cache()


def _halved(forward: ForwardFn) -> int:
    """Halve a micro-batch; UserError where that cannot be."""
    size = forward.micro_size
    if forward.is_collective and forward.may_shrink and size > 1:
        advice = f"ZeRO-3 needs equally many micro-batches on all ranks, give batch.micro_size={size // 2}"
        raise UserError(f"out of memory with micro_size {size}; {advice}")
    if not forward.may_shrink or size == 1:
        advice = "use batch.micro_size=auto, run.checkpointing=true or a smaller data.block_size"
        raise UserError(f"out of memory with micro_size {size}; {advice}")
    forward.micro_size = size // 2
    return forward.micro_size
