"""Ranks and devices: the one door to Accelerate, and the only module that knows DeepSpeed.

ZeRO-1 and ZeRO-2 are given the adapter alone: the base runs beside the engine, untouched by it. ZeRO-3 is given the
whole model, because its weights are what it shares out. All three get the step's gradient in one backward of a
linear function that has it as its gradient, so each reduces once a step.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftune.config.recipe import Recipe
from peftune.config.shipped import shipped
from peftune.errors import Interrupted, PeftuneError, UserError
from peftune.model.base import Base
from peftune.training import optimizer as optimizers
from peftune.training.distributed.checks import check_engine_file, refuse_for_zero3
from peftune.training.distributed.replicated import (
    Moments,
    ReplicatedStrategy,
    Tensors,
    UpdateStrategy,
    bytes_of,
    state_bytes,
)
from peftune.training.gradient import Gradient

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import GPT2Config, GPT2LMHeadModel

    from peftune.model.reference import LossModel

_BUCKETS = {  # elements, for "auto"; Accelerate would look for a hidden size, which an adapter does not have
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 15_000_000,
    "stage3_param_persistence_threshold": 10_000,
}
_PATIENCE = timedelta(hours=6)  # one rank may tokenise for long; the watchdog notices ranks that are gone


def start(trackers: list[str], folder: str) -> Accelerator:
    """Join the other ranks, if there are any; UserError for an engine that is not there."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    wants_zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if wants_zero:
        _prepare_for_deepspeed(on_gpu)
    AcceleratorState._reset_state()  # an earlier run of this process may have had other settings
    # Without a backend by name, ZeRO on CPU ranks sees one process on every rank, and all write the same files.
    group = InitProcessGroupKwargs(backend="gloo" if wants_zero and not on_gpu else None, timeout=_PATIENCE)
    accelerator = Accelerator(
        cpu=not on_gpu and not wants_zero,
        mixed_precision="no",  # the recipe's precision is applied around the forward, the same for every engine
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[group],
    )
    _refuse_unknown_engine(accelerator)
    return accelerator


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the group of ranks at the end, in good order; after an error the others may no longer be there."""
    try:
        yield
    except PeftuneError as error:
        if error.exit_code == Interrupted.exit_code:  # all ranks end here
            _leave_group()
        raise
    _leave_group()


def zero_stage(accelerator: Accelerator) -> int:
    """1, 2 or 3 where DeepSpeed ZeRO shares out memory, 0 where it does not."""
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
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # it sees one backward a step
    config |= {"train_batch_size": accelerator.num_processes, "gradient_clipping": recipe.optim.clip or 0.0}
    zero = config["zero_optimization"]
    zero |= {key: size for key, size in _BUCKETS.items() if zero.get(key) == "auto"}


def build_strategy(
    accelerator: Accelerator, scorer: LossModel, parameters: dict[str, nn.Parameter], recipe: Recipe
) -> UpdateStrategy:
    """The engine that the launcher asked for, around these parameters."""
    bare = optimizers.build(parameters, recipe.optim, fused=accelerator.device.type == "cuda")
    if _is_zero(accelerator):
        return ShardedStrategy(accelerator, scorer, parameters, bare)
    return ReplicatedStrategy(scorer, parameters, bare, recipe.optim.clip, accelerator.num_processes)


class ShardedStrategy:
    """DeepSpeed ZeRO: AdamW's moments (1), gradients (2) and weights (3) lie on the ranks in equal parts."""

    def __init__(
        self,
        accelerator: Accelerator,
        scorer: LossModel,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.forward_is_collective = zero_stage(accelerator) == 3
        self.parameters, self.ranks = parameters, accelerator.num_processes
        owned = scorer if self.forward_is_collective else nn.ParameterList(parameters.values())
        self.engine, _ = accelerator.prepare(owned, optimizer)
        self.module = self.engine if self.forward_is_collective else scorer
        if self.forward_is_collective:  # the loss reads the head's weight outside of the head's own forward
            import deepspeed

            deepspeed.zero.register_external_parameter(scorer, scorer.causal().lm_head.weight)
        else:
            self._begin_state()

    def update(self, gradient: Gradient, divisor: float, rate: float) -> float:
        gradient.flat.mul_(self.ranks / divisor)  # the engine averages over ranks
        optimizers.set_rate(self.engine.optimizer, rate)
        self.engine.optimizer.zero_grad()  # else ZeRO-3 adds to the step before
        with self._gathered(gradient.parameters):
            linear = [
                torch.dot(p.reshape(-1), view.reshape(-1))
                for p, view in zip(gradient.parameters, gradient.views, strict=True)
            ]
            self.engine.backward(torch.stack(linear).sum())
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def whole(self) -> tuple[Tensors, Moments]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        values = {n: safe_get_full_fp32_param(p).detach().cpu().clone() for n, p in self.parameters.items()}
        done = self._steps()
        if not done or not done[0]:
            return values, {}
        moments: Moments = {}
        for name, p in self.parameters.items():
            found = {key: safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
            moments[name] = {key: entry.detach().cpu().clone() for key, entry in found.items()}
            moments[name]["step"] = done[0].detach().cpu().clone()
        return values, moments

    def restore(self, values: Tensors, moments: Moments) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        device = self.engine.device
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, values[name].to(device))
        nothing = Gradient(list(self.parameters.values()), [values[name].shape for name in self.parameters], device)
        self.update(nothing, divisor=1.0, rate=0.0)  # AdamW's state comes to be, every copy of the adapter is renewed
        for name, parameter in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                value = moments[name][key] if moments else torch.zeros_like(values[name])
                safe_set_full_optimizer_state(parameter, value.to(device), key)
        steps = next(iter(moments.values()))["step"] if moments else torch.zeros(())
        for count in self._steps():
            count.copy_(steps)

    def held_bytes(self, model: nn.Module) -> dict[str, int]:
        base = self.engine.optimizer.optimizer
        masters = sum(map(bytes_of, base.state))  # the flat fp32 parts that it updates
        parts = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]  # beside them, what is gathered
        held = sum(map(bytes_of, parts)) + sum(map(bytes_of, model.parameters()))
        return {"parameters": held, "optimizer_state": state_bytes(base) + masters}

    def _begin_state(self) -> None:
        """AdamW's state before its first step: ZeRO-1 and 2 link it once the first of several groups has one."""
        base = self.engine.optimizer.optimizer
        for group in base.param_groups:
            for flat in group["params"]:
                place = flat.device if group["fused"] else "cpu"
                moments = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
                base.state[flat] = {"step": torch.zeros((), device=place), **moments}

    def _steps(self) -> list[torch.Tensor]:
        """AdamW's step counters on this rank, one for each flat part it holds."""
        return [state["step"] for state in self.engine.optimizer.optimizer.state.values() if "step" in state]

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        if not self.forward_is_collective:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield


def load_sharded(base: Base, config: GPT2Config, dtype: torch.dtype, accelerator: Accelerator) -> GPT2LMHeadModel:
    """The base with its weights shared out as they come, one tensor after another; no rank ever holds it whole.

    Only the first rank reads the files; UserError there for weights that are not whole.
    """
    import deepspeed
    from transformers import GPT2LMHeadModel
    from transformers.initialization import no_init_weights

    # The format is asked for by configuration: on a CPU, DeepSpeed takes any `dtype=` for bf16.
    asked = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    zero = accelerator.state.deepspeed_plugin.deepspeed_config | asked
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=zero, mem_efficient_linear=False):
        model = GPT2LMHeadModel(config)
    model.tie_weights()
    assert all(p.dtype == dtype for p in model.parameters()), "DeepSpeed chose another number format"
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if accelerator.is_main_process:
                parameter.data.copy_(base.weights.tensor(name))
    return model


def _leave_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_zero(accelerator: Accelerator) -> bool:
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def _refuse_unknown_engine(accelerator: Accelerator) -> None:
    """Accelerate knows more ways of sharing out a model than peftune has made exact."""
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"):
        raise UserError(
            f"the launcher's configuration asks for {kind}; peftune runs on one process, DDP or DeepSpeed ZeRO: "
            "take a file of accelerate_configs/"
        )


def _prepare_for_deepspeed(on_gpu: bool) -> None:
    """What must be so before DeepSpeed is first imported; UserError for what it would get wrong."""
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    except ImportError:
        raise UserError(
            "the launcher asks for DeepSpeed, which is not installed; pip install 'peftune[deepspeed]'"
        ) from None
    # An all-reduce for inference, which nothing here calls: starting would compile it for a minute on each machine.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls PyTorch's collectives by names that PyTorch 2.13 has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.\w+` is deprecated")
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if named:  # the shipped files name theirs relative to the folder above them, wherever the run is started
        path = Path(named) if Path(named).is_file() or not shipped(named).is_file() else shipped(named)
        check_engine_file(path)
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
