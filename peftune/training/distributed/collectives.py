"""Collectives: sums, values of all ranks or of the first, and errors that concern all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator

from peftune.data.batches import NOT_SCORED, Batch
from peftune.errors import CheckFailed, Interrupted, PeftuneError, RankLost, ReportedElsewhere, UserError, first_line
from peftune.model.train.layers import to_device
from peftune.training.distributed.signals import StopRequest

Result = TypeVar("Result")

_SHARED_GPU = "Duplicate GPU detected"  # NCCL's words

# In what gloo, NCCL and the store raise when a peer is gone; PyTorch has no exception type for what gloo raises.
_PEER_GONE = ("gloo", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL", "TCPStore", "timed out")


def all_reduce_sum(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if accelerator.num_processes == 1:
        return list(values)
    sums = to_device(torch.tensor(values, dtype=torch.float64), accelerator.device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def all_gather(accelerator: Accelerator, value: Result) -> list[Result]:
    """The value of every rank, in the order of ranks, on all ranks."""
    if accelerator.num_processes == 1:
        return [value]
    found: list[Result] = [value] * accelerator.num_processes
    torch.distributed.all_gather_object(found, value)
    return found


def broadcast(accelerator: Accelerator, make: Callable[[], Result]) -> Result:
    """What `make` returns on the first rank, on all ranks; where it fails, all ranks do."""
    made: list[Result | None] = [None]
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            made = [make()]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(made, src=0, device=accelerator.device)
    return made[0]  # type: ignore[return-value]


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Either every rank leaves this block without an error, or all leave it with one, which is reported once.

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
        raise ReportedElsewhere(failures[0].exit_code, str(failures[0]))
    if error is not None:
        raise error
    raise type(failures[0])(f"{failures[0]} (on another rank than the first)")


@contextmanager
def report_clearly(accelerator: Accelerator) -> Iterator[None]:
    """What all ranks raise at the same time (a signal, broken numbers) is reported by the first rank alone.

    What the network library raises when a rank is gone becomes RankLost, in one clear line.
    """
    try:
        yield
    except (Interrupted, CheckFailed) as error:
        if accelerator.is_main_process:
            raise
        raise ReportedElsewhere(error.exit_code, str(error)) from None
    except RuntimeError as error:
        if _SHARED_GPU in str(error):
            if not accelerator.is_main_process:
                raise ReportedElsewhere(UserError.exit_code) from None
            raise UserError("ranks share a GPU; start as many ranks on a machine as it has GPUs") from error
        if accelerator.num_processes == 1 or not _is_peer_gone(error):
            raise
        raise RankLost(
            f"rank {accelerator.process_index} lost another rank ({first_line(error)}); the job ends here, "
            "the same command goes on from the last checkpoint"
        ) from error


@contextmanager
def report_after_a_signal(stop: StopRequest) -> Iterator[None]:
    """Other ranks that end by the same signal a moment earlier are no failure."""
    try:
        yield
    except RuntimeError as error:
        if stop.name is None or not _is_peer_gone(error):
            raise
        raise Interrupted(f"{stop.name}: other ranks had ended first; the same command goes on") from error


def _is_peer_gone(error: RuntimeError) -> bool:
    return any(sign in str(error) for sign in _PEER_GONE)


def lockstep_batches(
    accelerator: Accelerator, forward_is_collective: bool, batches: Iterable[Batch], stop: StopRequest
) -> Iterator[Batch]:  # fmt: skip
    """This rank's micro-batches, until they end or a signal came here; the caller then asks the other ranks.

    Where a forward is collective (ZeRO-3), all ranks get equally many: one that has run out gets batches that score
    nothing.
    """
    if not forward_is_collective:
        for batch in batches:
            if stop.name is not None:
                return
            yield batch
        return
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    idle = Batch(zeros, torch.arange(8)[None], torch.full_like(zeros, NOT_SCORED), None)
    own = iter(batches)
    while True:
        following = next(own, None)
        left, stopped = all_reduce_sum(accelerator, float(following is not None), float(stop.name is not None))
        if stopped or not left:
            return
        yield following or idle
