"""DeepSpeed ZeRO: the only module that knows DeepSpeed.

ZeRO-1 and ZeRO-2 get the adapter alone: the base runs beside DeepSpeed's engine, untouched by it. ZeRO-3 gets the full
model, because it shards the weights. All three get the step's gradient in one backward of a linear function
that has it as its gradient, so each reduces once a step.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import nn
from transformers import GPT2LMHeadModel

from peftune.config.recipe import Recipe
from peftune.config.shipped import shipped
from peftune.errors import UserError
from peftune.files import read_object
from peftune.model.base import Base
from peftune.model.load import recompute_activations, with_dropout
from peftune.model.lora import Adapted, inject
from peftune.model.loss import LossModel
from peftune.training.distributed.agreement import flatten
from peftune.training.distributed.collectives import raise_on_all_ranks
from peftune.training.optimizer import MOMENTS, Gradient, Parameters, Tensors, set_rate, state_bytes

_BUCKETS = {  # elements, for "auto"; Accelerate would look for a hidden size, which an adapter does not have
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 15_000_000,
    "stage3_param_persistence_threshold": 10_000,
}


def stage_of(accelerator: Accelerator) -> int:
    """1, 2 or 3 as the launcher's configuration says."""
    return int(accelerator.state.deepspeed_plugin.zero_stage)


def settings_of(accelerator: Accelerator) -> dict[str, object]:
    """What the launcher's DeepSpeed file says, flat."""
    return flatten(accelerator.state.deepspeed_plugin.deepspeed_config)


def configure(accelerator: Accelerator, recipe: Recipe) -> None:
    """Write what the recipe decides into DeepSpeed's configuration.

    UserError, before anything is loaded, for a recipe that ZeRO-3 would train wrongly or not at all.
    """
    if stage_of(accelerator) == 3:
        refuse_for_zero3(recipe)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # it sees one backward a step
    config |= {"train_batch_size": accelerator.num_processes, "gradient_clipping": recipe.optim.clip or 0.0}
    zero = config["zero_optimization"]
    zero |= {key: size for key, size in _BUCKETS.items() if zero.get(key) == "auto"}


def refuse_for_zero3(recipe: Recipe) -> None:
    """UserError, before anything is loaded, for a recipe that ZeRO-3 would train wrongly or not at all."""
    lora, quantize = recipe.lora, recipe.quantize
    outside = {"wte", "wpe", "lm_head"} & (set() if isinstance(lora.targets, str) else set(lora.targets))
    refused = {
        f"quantize: {quantize} (8-bit trains to a wrong loss there, 4-bit weights cannot be sharded)": quantize,
        f"lora.variant: {lora.variant} (it reads full weights, and a rank has a shard)": lora.variant
        not in ("lora", "rslora"),
        "lora.modules_to_save (modules would be copied from shards)": lora.modules_to_save,
        "data.new_tokens (their rows would be read from shards)": recipe.data.new_tokens,
        "lora.targets outside the blocks (wte, wpe, lm_head)": outside,
        "run.samples (no rank has the full model to generate with)": recipe.run.samples,
    }
    problems = [text for text, applies in refused.items() if applies]
    if problems:
        raise UserError(f"ZeRO-3 cannot be combined with {'; '.join(problems)}; use ZeRO-2, or leave these out")


def check_engine_file(path: Path) -> None:
    """UserError where the file is missing, or decides what the recipe decides."""
    values = read_object(path)
    problems = [f"{key} (peftune has its own)" for key in ("optimizer", "scheduler") if key in values]
    problems += [f"{key} (run.precision says it)" for key in ("bf16", "fp16", "amp", "torch_autocast") if key in values]
    owned = {"gradient_accumulation_steps": (1, "auto"), "gradient_clipping": ("auto",)}
    problems += [
        f'{key}: {values[key]} (the recipe says it, use "auto")'
        for key, allowed in owned.items()
        if values.get(key, "auto") not in allowed
    ]
    if problems:
        raise UserError(f"{path}: cannot be used because of {', '.join(problems)}; see ds_configs/")


class ShardedStrategy:
    """DeepSpeed ZeRO: AdamW's moments (1), gradients (2) and weights (3) are sharded evenly over the ranks."""

    def __init__(
        self, accelerator: Accelerator, loss_model: LossModel, parameters: Parameters, optimizer: torch.optim.Optimizer
    ) -> None:
        self.forward_is_collective = stage_of(accelerator) == 3
        self.parameters, self.ranks = parameters, accelerator.num_processes
        owned = loss_model if self.forward_is_collective else nn.ParameterList(parameters.values())
        self.engine, _ = accelerator.prepare(owned, optimizer)
        self.module = self.engine if self.forward_is_collective else loss_model
        if self.forward_is_collective:  # the loss reads the head's weight outside of the head's own forward
            import deepspeed

            deepspeed.zero.register_external_parameter(loss_model, loss_model.causal().lm_head.weight)
        else:
            self._begin_state()

    def update(self, gradient: Gradient, divisor: float, rate: float, summed: bool = False) -> torch.Tensor:
        import deepspeed

        assert not summed, "the engine sums over ranks itself"
        gradient.flat.mul_(self.ranks / divisor)  # the engine averages over ranks
        set_rate(self.engine.optimizer, rate)
        self.engine.optimizer.zero_grad()  # else ZeRO-3 adds to the step before
        with deepspeed.zero.GatheredParameters(gradient.parameters, enabled=self.forward_is_collective):
            linear = [
                torch.dot(p.reshape(-1), view.reshape(-1))
                for p, view in zip(gradient.parameters, gradient.views, strict=True)
            ]
            self.engine.backward(torch.stack(linear).sum())
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def state_dict(self) -> tuple[Tensors, Tensors]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        values = {n: safe_get_full_fp32_param(p).detach().cpu().clone() for n, p in self.parameters.items()}
        steps = self._steps()
        if not steps or not steps[0]:
            return values, {}
        moments = {}
        for name, p in self.parameters.items():
            for key in MOMENTS:
                entry = steps[0] if key == "step" else safe_get_full_optimizer_state(p, key)
                moments[f"{name}/{key}"] = entry.detach().cpu().clone()
        return values, moments

    def load_state_dict(self, values: Tensors, moments: Tensors) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        device = self.engine.device
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, values[name].to(device))
        nothing = Gradient(list(self.parameters.values()), [values[name].shape for name in self.parameters], device)
        self.update(nothing, divisor=1.0, rate=0.0)  # AdamW's state comes to be, every copy of the adapter is renewed
        for name, parameter in self.parameters.items():
            for key in MOMENTS[1:]:
                value = moments[f"{name}/{key}"] if moments else torch.zeros_like(values[name])
                safe_set_full_optimizer_state(parameter, value.to(device), key)
        for count in self._steps():
            count.copy_(moments[f"{name}/step"] if moments else torch.zeros(()))

    def memory_bytes(self, model: nn.Module) -> dict[str, int]:
        base = self.engine.optimizer.optimizer
        masters = sum(flat.nbytes for flat in base.state)  # the flat fp32 shards that it updates
        shards = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]  # beside them, what is gathered
        parameters = sum(tensor.nbytes for tensor in (*shards, *model.parameters()))
        return {"parameters": parameters, "optimizer_state": state_bytes(base) + masters}

    def _begin_state(self) -> None:
        """AdamW's state before its first step: ZeRO-1 and 2 link it once the first of several groups has one."""
        base = self.engine.optimizer.optimizer
        for group in base.param_groups:
            for flat in group["params"]:
                device = flat.device if group["fused"] else "cpu"
                moments = {key: torch.zeros_like(flat) for key in MOMENTS[1:]}
                base.state[flat] = {"step": torch.zeros((), device=device), **moments}

    def _steps(self) -> list[torch.Tensor]:
        """AdamW's step counters on this rank, one for each flat shard it has."""
        return [state["step"] for state in self.engine.optimizer.optimizer.state.values() if "step" in state]


def load_sharded(
    recipe: Recipe, base: Base, dtype: torch.dtype, accelerator: Accelerator, settings: LoraConfig | None = None
) -> Adapted:
    """The base with a fresh adapter, sharded as it is read, one tensor after another; no rank ever has all of it.

    Only the first rank reads the files; UserError, on all ranks, for incomplete weights.
    """
    import deepspeed
    from transformers.initialization import no_init_weights

    with raise_on_all_ranks(accelerator):
        refuse_for_zero3(recipe)  # again: an adapter that the run goes on from decides as well
        if accelerator.is_main_process:
            assert base.weights, "opened here, where an error of the first rank can still be raised on all"
    # The format is asked for by configuration: on a CPU, DeepSpeed takes any `dtype=` for bf16.
    asked = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    zero = accelerator.state.deepspeed_plugin.deepspeed_config | asked
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=zero, mem_efficient_linear=False):
        model = GPT2LMHeadModel(with_dropout(base.config, recipe.run.base_dropout))
    model.tie_weights()
    assert all(p.dtype == dtype for p in model.parameters()), "DeepSpeed chose another number format"
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if accelerator.is_main_process:
                parameter.data.copy_(base.weights.tensor(name))
    adapted = inject(model, recipe.lora, recipe.run.seed, settings=settings)
    if recipe.run.checkpointing:
        recompute_activations(adapted)
    return adapted


def prepare_import(on_gpu: bool) -> None:
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
