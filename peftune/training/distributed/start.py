"""Start and configure the ranks through Accelerate: one process, DDP, or DeepSpeed ZeRO."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from peftune.config.recipe import Recipe
from peftune.errors import Interrupted, PeftuneError, UserError
from peftune.training.distributed import zero
from peftune.training.distributed.checks import refuse_for_zero3

if TYPE_CHECKING:
    from accelerate import Accelerator

_TIMEOUT = timedelta(hours=6)  # one rank may tokenise for long; the watchdog notices ranks that are gone


def start(trackers: list[str], folder: str) -> Accelerator:
    """Join the other ranks, if there are any; UserError for DeepSpeed where it is not installed."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    wants_zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if wants_zero:
        zero.prepare_import(on_gpu)
    AcceleratorState._reset_state()  # an earlier run of this process may have had other settings
    # Without a backend by name, ZeRO on CPU ranks sees one process on every rank, and all write the same files.
    group = InitProcessGroupKwargs(backend="gloo" if wants_zero and not on_gpu else None, timeout=_TIMEOUT)
    accelerator = Accelerator(
        cpu=not on_gpu and not wants_zero,
        mixed_precision="no",  # the recipe's precision is applied around the forward, the same everywhere
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[group],
    )
    _refuse_unknown_strategy(accelerator)
    return accelerator


@contextmanager
def process_group() -> Iterator[None]:
    """Destroy the process group at the end; after an error the other ranks may no longer be there."""
    try:
        yield
    except PeftuneError as error:
        if error.exit_code == Interrupted.exit_code:  # all ranks end here
            _leave_group()
        raise
    _leave_group()


def zero_stage(accelerator: Accelerator) -> int:
    """1, 2 or 3 where DeepSpeed ZeRO shards memory, 0 where it does not."""
    plugin = accelerator.state.deepspeed_plugin if _is_zero(accelerator) else None
    return int(plugin.zero_stage) if plugin is not None else 0


def layout(accelerator: Accelerator) -> str:
    """How this run is laid out, in words: `1 process`, `2 ranks, DDP`, `8 ranks, ZeRO-2`."""
    ranks, stage = accelerator.num_processes, zero_stage(accelerator)
    if ranks == 1 and not stage:
        return "1 process"
    return f"{ranks} ranks, {f'ZeRO-{stage}' if stage else 'DDP'}"


def idle_gpus(accelerator: Accelerator) -> int:
    """GPUs of this machine that a run without a launcher leaves alone."""
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cuda"
    return torch.cuda.device_count() - 1 if alone else 0


def configure(accelerator: Accelerator, recipe: Recipe) -> None:
    """Write what the recipe decides into DeepSpeed's configuration, if there is one.

    UserError, before anything is loaded, for a recipe that ZeRO-3 would train wrongly or not at all.
    """
    if not _is_zero(accelerator):
        return
    if zero_stage(accelerator) == 3:
        refuse_for_zero3(recipe)
    zero.configure(accelerator.state.deepspeed_plugin.deepspeed_config, accelerator.num_processes, recipe.optim.clip)


def _leave_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_zero(accelerator: Accelerator) -> bool:
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def _refuse_unknown_strategy(accelerator: Accelerator) -> None:
    """Accelerate knows more ways to shard a model than peftune has made exact."""
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"):
        raise UserError(
            f"the launcher's configuration asks for {kind}; peftune runs on one process, DDP or DeepSpeed ZeRO: "
            "take a file of accelerate_configs/"
        )
