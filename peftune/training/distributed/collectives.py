"""What ranks say to each other: sums, the first rank's word, and errors that concern all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from peftune.data.batches import NOT_SCORED, Batch
from peftune.errors import CheckFailed, Interrupted, PeftuneError, RankLost, ReportedElsewhere, first_line
from peftune.training.distributed.signals import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")

# How gloo, NCCL and the store say that a peer is gone; PyTorch has no type of its own for what gloo raises.
_PEER_GONE = ("gloo", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL", "TCPStore", "timed out")


def all_reduce_sum(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if accelerator.num_processes == 1:
        return list(values)
    here = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(here)
    return here.tolist()


def all_gather(accelerator: Accelerator, value: Result) -> list[Result]:
    """The value of every rank, in the order of ranks, known to all."""
    if accelerator.num_processes == 1:
        return [value]
    found: list[Result] = [value] * accelerator.num_processes
    torch.distributed.all_gather_object(found, value)
    return found


def broadcast(accelerator: Accelerator, make: Callable[[], Result]) -> Result:
    """What the first rank makes, known to all; where it fails, all ranks do."""
    made: list[Result | None] = [None]
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            made = [make()]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(made, src=0, device=accelerator.device)
    return made[0]  # type: ignore[return-value]


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Either every rank leaves this block well, or all leave it with an error, which the person reads once.

    Nothing inside may wait for another rank.
    """
    error: PeftuneError | None = None
    try:
        yield
    except PeftuneError as caught:
        error = caught
    failures = [failure for failure in all_gather(accelerator, error) if failure is not None]
    if not failures:
        return
    if not accelerator.is_main_process:
        raise ReportedElsewhere(failures[0].exit_code)
    if error is not None:
        raise error
    raise type(failures[0])(f"{failures[0]} (on another rank than the first)")


@contextmanager
def report_on_rank0(accelerator: Accelerator) -> Iterator[None]:
    """What every rank finds at the same time, a signal or broken numbers, is told by the first."""
    try:
        yield
    except (Interrupted, CheckFailed) as error:
        if accelerator.is_main_process:
            raise
        raise ReportedElsewhere(error.exit_code) from None


@contextmanager
def translate_peer_errors(accelerator: Accelerator) -> Iterator[None]:
    """Turn what the network library raises when a rank is gone into one clear line."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not any(sign in str(error) for sign in _PEER_GONE):
            raise
        raise RankLost(
            f"rank {accelerator.process_index} lost another rank ({first_line(error)}); the job ends here, "
            "the same command goes on from the last checkpoint"
        ) from error


def lockstep_batches(
    accelerator: Accelerator, forward_is_collective: bool, batches: Iterable[Batch], stop: StopRequest
) -> Iterator[Batch]:  # fmt: skip
    """This rank's micro-batches, until they end or a signal came; the caller then compares notes with the others.

    Where a forward needs all ranks, all get equally many: one that has run out gets batches that score nothing.
    """
    if not forward_is_collective:
        for batch in batches:
            if stop.name is not None:
                return
            yield batch
        return
    waiting = iter(batches)
    while True:
        mine = next(waiting, None)
        left, stopped = all_reduce_sum(accelerator, float(mine is not None), float(stop.name is not None))
        if stopped or not left:
            return
        yield _idle_batch() if mine is None else mine


def _idle_batch() -> Batch:
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    return Batch(zeros, torch.arange(8)[None], torch.full_like(zeros, NOT_SCORED), None)
