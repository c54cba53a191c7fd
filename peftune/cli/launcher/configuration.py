"""What a configuration asks for on this machine, as arguments of `accelerate launch`."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from peftune.config.messages import short
from peftune.config.shipped import shipped
from peftune.config.yaml_loader import read_yaml
from peftune.errors import UserError
from peftune.files import read_object

if TYPE_CHECKING:
    from peftune.training.planning.memory_model import Way

_MOST_RANKS = 10_000


@dataclass(frozen=True)
class LaunchOptions:
    """`arguments` of `accelerate launch`; `one_process` where a configuration starts no more than that.

    `environment` is what the ranks get beside this process's: visible GPUs, a share of the cores for each.
    """

    arguments: dict[str, object]
    one_process: bool
    environment: dict[str, str]

    def ranks(self) -> int:
        """Processes on all machines together."""
        return 1 if self.one_process else int(str(self.arguments["num_processes"]))

    def way(self) -> Way:
        """How memory is shared out among the ranks, as `training.planning.memory_model` calls it."""
        file = self.arguments.get("deepspeed_config_file")
        if self.ranks() == 1 or not file:
            return "one" if self.ranks() == 1 else "ddp"
        zero = read_object(Path(str(file))).get("zero_optimization")
        stages: dict[object, Way] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return stages.get(zero.get("stage") if isinstance(zero, dict) else None, "ddp")

    def apply(self) -> None:
        """Set the environment, and silence what libraries log of a failed rank or a lost peer: peftune says it."""
        os.environ.update(self.environment)
        if "LOGLEVEL" not in os.environ:
            logging.disable(logging.ERROR)
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def read(config: str, processes: int | None, nodes: int) -> LaunchOptions:
    """The configuration of that name, or in that file; UserError where this machine cannot run it."""
    path = _find(config, nodes)
    settings = read_yaml(path, "the configuration", "the settings of accelerate")
    asked, deepspeed = settings.get("num_processes") or 1, settings.get("deepspeed_config") or {}
    file = deepspeed.get("deepspeed_config_file") or "" if isinstance(deepspeed, dict) else None
    if type(asked) is not int or not 1 <= asked <= _MOST_RANKS:
        raise UserError(f"{path}: num_processes is {short(asked)}; expected a number of 1 to {_MOST_RANKS:,}")
    if not isinstance(file, str):
        raise UserError(f"{path}: deepspeed_config is {short(deepspeed)}; expected deepspeed_config_file with a name")
    one_process = settings.get("distributed_type") in ("NO", False)  # unquoted, YAML reads NO as false
    gpus = 0 if settings.get("use_cpu") else _gpus(path.name)
    ranks = processes or gpus or max(1, asked // nodes)
    if one_process and (total := (processes or 1) * nodes) > 1:
        other = "cpu-2.yaml and ddp.yaml start as many as you say"
        raise UserError(f"{path.name} starts one process, so not {total}; {other}")
    environment = {"CUDA_VISIBLE_DEVICES": ""} if settings.get("use_cpu") else {}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // (1 if one_process else ranks)))
    arguments = {"config_file": path, "num_processes": ranks * nodes, "num_machines": nodes}
    if file:
        arguments["deepspeed_config_file"] = _find_deepspeed_file(file, path)
        arguments["deepspeed_multinode_launcher"] = "standard"  # else DeepSpeed starts the other machines over ssh
    return LaunchOptions(arguments, one_process, environment)


def become_the_rank(target: list[str]) -> NoReturn:
    """One process needs no launcher: it takes this one's place, so that signals and exit code are its own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *target])


def _find(name: str, nodes: int) -> Path:
    folder = shipped("accelerate_configs")
    candidates = [folder / f"multi-node-{name}.yaml"] * (nodes > 1) + [folder / f"{name}.yaml"]
    if "/" in name or name.endswith((".yaml", ".yml")):
        candidates = [Path(name)]
    for path in candidates:
        if path.is_file():
            return path
    known = " ".join(sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("multi-node-")))
    raise UserError(f"no configuration {name}; there are: {known}")


def _find_deepspeed_file(name: str, config: Path) -> Path:
    """The file that a configuration names: from the folder above the configuration's, from here, or the shipped one."""
    for path in (config.resolve().parents[1] / name, Path(name), shipped(name)):
        if path.is_file():
            return path.resolve()
    raise UserError(f"{config} names {name}, which is neither here nor in {config.resolve().parents[1]}")


def _gpus(name: str) -> int:
    """GPUs of this machine; UserError where there are none."""
    import torch

    from peftune.device import why_no_gpu

    if not torch.cuda.is_available():
        reason = why_no_gpu() or "torch finds none here"
        raise UserError(f"{name} is for GPUs and {reason}; cpu.yaml and cpu-2*.yaml need none")
    return torch.cuda.device_count()


def has_engine() -> bool:
    """Whether DeepSpeed is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def usable_cores() -> int:
    """Cores that this process may use, hyperthreads not counted."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)
