"""From what was read to a run that can take its first step: base and adapter in memory, forward and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import Accelerator

from peftune.config.recipe import Recipe
from peftune.console import Console
from peftune.device import device_name
from peftune.inference.perplexity import Score
from peftune.model.load import NAME_OF, footprint, load_adapted
from peftune.model.lora import Adapted
from peftune.model.loss import LossModel, is_frozen
from peftune.model.train import cross_entropy
from peftune.model.train.forward import TrainGPT2, reason_against, train_forward
from peftune.training import checkpoint
from peftune.training.checkpoint import Checkpoint, State
from peftune.training.distributed import start, zero
from peftune.training.distributed.collectives import all_gather, raise_on_all_ranks
from peftune.training.distributed.signals import StopRequest
from peftune.training.health import Health
from peftune.training.inputs import RunInputs
from peftune.training.metrics import MetricsLog
from peftune.training.optimizer import Gradient, ReplicatedStrategy, UpdateStrategy, build_adamw, first_loss_scale
from peftune.training.planning.trace import first_micro_size
from peftune.training.step import ForwardFn, Learner

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

_WORTH_COMPILING = {"cpu": 2e14, "cuda": 2e16}  # FLOP in ten minutes or so


@dataclass
class Course:
    """How far a run is since this process began it."""

    began: float = 0.0
    """On the clock, less what earlier processes took."""
    saved_step: int = -1
    """Of the newest checkpoint."""
    predicted: int = 0
    """Peak of memory in bytes; 0 until the first step."""
    foreseen: Callable[[], int] | None = None
    """Computes that peak, where several runs go on side by side."""
    task: Any = None
    """Its bar."""


@dataclass(frozen=True)
class Run:
    """A run in progress; `adapted` is the model inside `forward.module`."""

    inputs: RunInputs
    accelerator: Accelerator
    console: Console
    adapted: Adapted
    forward: ForwardFn
    health: Health
    gradient: Gradient
    strategy: UpdateStrategy
    state: State
    metrics: MetricsLog
    stop: StopRequest
    program: int  # bytes of this process before the base was loaded; 0 where the run is on a GPU
    base_scores: dict[int, Score] | None = None
    """Scores of the base that others know or may use; None where the first step begins elsewhere."""
    course: Course = field(default_factory=Course)

    @property
    def learner(self) -> Learner:
        """What takes its steps."""
        return Learner(self.inputs, self.state, self.forward, self.gradient, self.strategy)


@dataclass(frozen=True)
class Shared:
    """What runs have in common that go on side by side in one process."""

    model: Callable[[], GPT2LMHeadModel]
    """Makes modules of the base over the same weights."""
    stop: StopRequest
    program: int
    sums: dict[int, int] = field(default_factory=dict)
    """Checksums of frozen weights, as `Health` remembers them."""
    base_scores: dict[int, Score] = field(default_factory=dict)
    """Of blocks by their identity: what adapters that change nothing yet have in common."""


def bytes_of_program(accelerator: Accelerator) -> int:
    """Of this process now; 0 where tensors are on a GPU, and so not among them."""
    return int(psutil.Process().memory_info().rss) if accelerator.device.type == "cpu" else 0


def load_run(
    inputs: RunInputs,
    accelerator: Accelerator,
    dtype: torch.dtype,
    console: Console,
    found: Checkpoint | None = None,
    shared: Shared | None = None,
) -> Run:
    """Load the base, put the adapter on it, build forward and optimizer, open the metrics.

    Of what is `shared` with other runs nothing is loaded.
    """
    recipe, program = inputs.recipe, shared.program if shared else bytes_of_program(accelerator)
    state = found.state if found else State(loss_scale=first_loss_scale(dtype))
    state.identity = inputs.identity
    state.earlier_updates = inputs.init.updates if inputs.init else 0
    block, batch = inputs.corpus.train.packing.block_size, recipe.batch
    if batch.micro_size != "auto":
        state.micro_size = batch.micro_size
    elif not state.micro_size:
        ranks, kind = accelerator.num_processes, accelerator.device.type
        fitting = first_micro_size(inputs, dtype, start.way_of(accelerator), ranks, kind)
        state.micro_size = min(all_gather(accelerator, fitting))
    if start.zero_stage(accelerator) == 3:
        adapted = zero.load_sharded(recipe, inputs.base, dtype, accelerator, inputs.settings)
    else:
        with raise_on_all_ranks(accelerator):
            model = shared.model() if shared else None
            adapted = load_adapted(recipe, inputs.base, dtype, accelerator.device, inputs.settings, model)
    parameters = adapted.trainable()
    with raise_on_all_ranks(accelerator):
        if found:
            checkpoint.check_fits(found, parameters, Path(recipe.run.out) / "checkpoints")
    shapes = [p.shape for p in parameters.values()]
    gradient = Gradient(list(parameters.values()), shapes, accelerator.device, adapted.masks())
    loss_model = LossModel(adapted.model, recipe.optim.neftune, recipe.optim.label_smoothing)
    loss_model.train()
    optimizer = build_adamw(parameters, recipe.optim, fused=accelerator.device.type == "cuda")
    strategy: UpdateStrategy
    if start.zero_stage(accelerator):
        strategy = zero.ShardedStrategy(accelerator, loss_model, parameters, optimizer)
    else:
        strategy = ReplicatedStrategy(loss_model, parameters, optimizer, recipe.optim.clip, accelerator.num_processes)
    is_collective, tokens = strategy.forward_is_collective, inputs.total_steps * batch.global_size * block
    fast, description = choose_forward(adapted, recipe, dtype, is_collective, tokens, console)
    size, may_shrink = state.micro_size, batch.micro_size == "auto"
    forward = ForwardFn(strategy.module, fast, description, dtype, accelerator.device, is_collective, size, may_shrink)
    path = Path(recipe.run.out) / "metrics.jsonl"
    with raise_on_all_ranks(accelerator):
        metrics = MetricsLog(path, accelerator, recipe.model_dump(mode="json"), state)
    health = Health(inputs, adapted.model, accelerator, state, metrics, console, shared.sums if shared else None)
    stop = shared.stop if shared else StopRequest()
    first = (inputs, accelerator, console, adapted, forward, health, gradient)
    is_fresh = inputs.init is None and recipe.lora.variant in ("lora", "rslora")
    scores = shared.base_scores if shared and is_fresh else None
    return Run(*first, strategy, state, metrics, stop, program, scores)


def begin(run: Run, found: Checkpoint | None, brief: bool = False, notes: bool = True) -> None:
    """Go on from the checkpoint, if there is one; say and record what is about to be trained.

    `brief` leaves out what is said of all that learn side by side; without `notes` others have told them.
    """
    recipe, train, state, forward = run.inputs.recipe, run.inputs.corpus.train, run.state, run.forward
    facts, base = facts_of(run), footprint(run.adapted.model)
    if found is None:
        numbers = {
            "blocks": len(train), "block_size": train.packing.block_size,
            "packing_fill": round(train.packing.fill(), 4), "tokens_per_epoch": train.tokens(),
            "total_steps": run.inputs.total_steps, "micro_size": state.micro_size,
            "ranks": run.accelerator.num_processes, "function": forward.description, **facts,
            "data": run.inputs.description(state.micro_size), "notes": [*run.inputs.notes()],
        }  # fmt: skip
        if not forward.is_collective:  # else a rank has a shard, of which the event "memory" tells
            numbers |= {"base_bytes": base.held, "base_bytes_fp32": base.fp32, "base_bytes_bf16": base.bf16}
        if init := run.inputs.init:
            run.strategy.load_state_dict(init.first_values(run.adapted), init.moments)
        run.metrics.write("start", recipe=recipe.model_dump(mode="json"), **numbers)
    else:
        run.strategy.load_state_dict(found.values, found.moments)
        lost = {"lost": run.metrics.lost} if run.metrics.lost else {}
        run.metrics.write("resume", from_step=state.step, layout=facts["layout"], **lost)
        run.console.say(f"resuming {recipe.run.out} from step {state.step}")
        if run.metrics.lost:
            run.console.say(run.metrics.lost)
            run.metrics.lost = ""
    for note in run.inputs.notes() if notes else ():
        run.console.say(note)
    run.console.say(run.inputs.description(state.micro_size))
    if brief:
        return
    run.console.say(
        f"{facts['trainable_parameters']:,} trainable parameters, {facts['precision']}, {facts['layout']}, "
        f"{facts['device']}; {forward.description}"
    )
    if recipe.quantize is not None:
        run.console.say(base.description(recipe.quantize))


def facts_of(run: Run) -> dict[str, Any]:
    """How the run computes, for its metrics and its provenance."""
    facts = {"precision": NAME_OF[run.forward.dtype], "layout": start.layout(run.accelerator)}
    facts["device"] = device_name(run.accelerator.device)
    return facts | {"trainable_parameters": run.gradient.trained}


def choose_forward(
    adapted: Adapted, recipe: Recipe, dtype: torch.dtype, sharded: bool, tokens: int, console: Console
) -> tuple[TrainGPT2 | None, str]:
    """The fast forward wherever it computes the same, or None, and a description; `sharded` is a base under ZeRO-3.

    `tokens` is what the run learns from, at most: whether compiling repays.
    """
    reason = "run.fast is false" if not recipe.run.fast else "ZeRO-3 shards the base" if sharded else None
    core: Any = adapted.model.get_base_model()
    has_choice = core.device.type == "cuda" and is_frozen(core.lm_head)
    loss = cross_entropy.description(core.device, dtype) if has_choice else ""
    if reason := reason or reason_against(adapted):
        return None, f"steps by Transformers and PEFT ({', '.join(filter(None, (reason, loss)))})"
    optim, worth = recipe.optim, recipe.run.compile and _is_worth_compiling(adapted, tokens)
    if worth:
        console.say("compiling elementwise operations: half a minute the first time, seconds afterwards")
    fast = train_forward(adapted, dtype, optim.neftune, optim.label_smoothing, recipe.run.checkpointing, worth)
    too_short = "not compiled: the run is too short to repay it" if recipe.run.compile and not worth else ""
    compiled = fast.elementwise.description or too_short
    return fast, f"fast steps ({', '.join(filter(None, (fast.kernel.name, loss, compiled)))})"


def _is_worth_compiling(adapted: Adapted, tokens: int) -> bool:
    """Whether a run takes many minutes: of its time compiling saves a few percent, and takes half a minute.

    Decided by the recipe and the data alone, so that a run that is resumed decides as it did before.
    """
    core: Any = adapted.model.get_base_model()
    elements = 12 * core.config.n_layer * core.config.n_embd**2 + core.lm_head.weight.numel()
    return bool(4.0 * elements * tokens > _WORTH_COMPILING.get(core.device.type, 0.0))
