"""Start the ranks through Accelerate: one process, DDP, or DeepSpeed ZeRO."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers

from peftune.config.recipe import Recipe
from peftune.device import choose_device, choose_precision
from peftune.errors import Interrupted, PeftuneError, UserError, first_line, report_once_per_machine
from peftune.model import quantized
from peftune.model.load import DTYPES
from peftune.training.distributed import zero
from peftune.training.distributed.agreement import flatten, refuse_different_ranks, versions
from peftune.training.distributed.collectives import raise_on_all_ranks, report_clearly
from peftune.training.distributed.watchdog import rendezvous_deadline, watch_peers
from peftune.training.planning.memory_model import Way

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"  # of a size that does not change (NVIDIA's documentation of cuBLAS)
_TIMEOUT = timedelta(hours=6)  # one rank may tokenise for long; the watchdog notices ranks that are gone


@contextmanager
def watched_ranks(*recipes: Recipe) -> Iterator[Accelerator]:
    """Join the other ranks, where there are any, and watch them to the end of the run, or of several.

    UserError, on all ranks, where another has another recipe, layout or version; `run.out` may differ, as the first
    rank alone writes and reads it.
    """
    first, deterministic = recipes[0].run, any(recipe.run.deterministic for recipe in recipes)
    if devices := {recipe.run.device for recipe in recipes} - {first.device}:
        raise UserError(f"run.device is {first.device} and {devices.pop()}; recipes that run together need one")
    if deterministic:
        os.environ.setdefault(*_WORKSPACE)  # before CUDA starts
    with report_once_per_machine(), rendezvous_deadline():
        accelerator = start(list(first.track), first.out, first.device)
    with same_order_of_sums(deterministic), report_clearly(accelerator), watch_peers(accelerator):
        values = {
            f"fleet[{number}].{key}" if number else key: value
            for number, recipe in enumerate(recipes)
            for key, value in flatten(recipe.model_dump(mode="json")).items()
            if key != "run.out"
        }
        libraries = quantized.LIBRARIES * any(recipe.quantize for recipe in recipes)
        libraries += ("deepspeed",) * bool(zero_stage(accelerator))
        refuse_different_ranks(accelerator, values | versions(libraries) | _engine_settings(accelerator))
        yield accelerator


@contextmanager
def same_order_of_sums(wanted: bool) -> Iterator[None]:
    """Meanwhile only kernels that add up in the same order each time, if that is `wanted` (`run.deterministic`).

    UserError where torch has none for an operation.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    except RuntimeError as error:
        if not wanted or "deterministic" not in str(error):
            raise
        raise UserError(f"run.deterministic: {first_line(error)}; leave it out, or change what needs it") from None
    finally:
        torch.use_deterministic_algorithms(before)


def start(trackers: list[str], folder: str, device: str = "auto") -> Accelerator:
    """Join the other ranks, if there are any; UserError for a tracker, or DeepSpeed, that is not installed, or a GPU.

    `device` is auto, cpu or cuda, as in `device.choose_device`; Accelerate's own settings may insist on the CPU too.
    """
    require_trackers(trackers)
    insists = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    on_gpu = choose_device("cpu" if insists else device).type == "cuda"
    wants_zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if wants_zero:
        zero.prepare_import(on_gpu)
    _stay_on_loopback()
    # An earlier run of this process may have had other settings, or another device.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Without a backend by name, ZeRO on CPU ranks sees one process on every rank, and all write the same files.
    group = InitProcessGroupKwargs(backend="gloo" if wants_zero and not on_gpu else None, timeout=_TIMEOUT)
    accelerator = Accelerator(
        cpu=not on_gpu and not wants_zero,
        mixed_precision="no",  # the recipe's precision is applied around the forward, the same everywhere
        log_with=trackers or None,
        project_dir=folder,
        kwargs_handlers=[group],
    )
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"):  # Accelerate shards in ways not made exact here
        raise UserError(
            f"the launcher's configuration asks for {kind}; peftune runs on one process, DDP or DeepSpeed ZeRO: "
            "take a file of accelerate_configs/"
        )
    return accelerator


def agreed_dtype(recipe: Recipe, accelerator: Accelerator) -> torch.dtype:
    """What a run computes in; UserError, on all ranks, where another has or can have another precision."""
    with raise_on_all_ranks(accelerator):
        precision = choose_precision(recipe.run.precision, accelerator.device.type == "cuda")
    refuse_different_ranks(accelerator, {"precision": precision})
    return DTYPES[precision]


def require_trackers(trackers: Sequence[str]) -> None:
    """UserError for a tracker that is not installed."""
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    if missing := [name for name in trackers if name not in available]:
        raise UserError(f"run.track: {', '.join(missing)} not installed; pip install 'peftune[track]', or leave it out")


def _stay_on_loopback() -> None:
    """Where all ranks are on this machine, gloo connects them through loopback: its own choice may listen outside."""
    ranks, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    if ranks != "1" and ranks == here:
        names = [name for name, found in psutil.net_if_addrs().items() for a in found if a.address == "127.0.0.1"]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


@contextmanager
def process_group() -> Iterator[None]:
    """Destroy the process group at the end; after an error the other ranks may no longer be there."""
    all_end_here = True
    try:
        yield
    except BaseException as error:
        all_end_here = isinstance(error, PeftuneError) and error.exit_code == Interrupted.exit_code
        raise
    finally:
        if all_end_here and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def zero_stage(accelerator: Accelerator) -> int:
    """1, 2 or 3 where ZeRO shards memory, 0 where it does not."""
    return zero.stage_of(accelerator) if str(accelerator.distributed_type.value) == "DEEPSPEED" else 0


def way_of(accelerator: Accelerator) -> Way:
    """How ranks share the work, as `planning.memory_model` calls it."""
    ways: dict[int, Way] = {1: "zero1", 2: "zero2", 3: "zero3"}
    return ways.get(zero_stage(accelerator), "ddp" if accelerator.num_processes > 1 else "one")


def idle_gpus(accelerator: Accelerator) -> int:
    """How many GPUs of this machine one process leaves unused."""
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cuda"
    return torch.cuda.device_count() - 1 if alone else 0


def layout(accelerator: Accelerator) -> str:
    """How this run is laid out, for people: `1 process`, `2 ranks, DDP`, `8 ranks, ZeRO-2`."""
    ranks, stage = accelerator.num_processes, zero_stage(accelerator)
    if ranks == 1 and not stage:
        return "1 process"
    return f"{ranks} ranks, {f'ZeRO-{stage}' if stage else 'DDP'}"


def _engine_settings(accelerator: Accelerator) -> dict[str, object]:
    engine = zero.settings_of(accelerator) if zero_stage(accelerator) else {}
    return {"layout": layout(accelerator)} | {f"DeepSpeed's {key}": value for key, value in engine.items()}
