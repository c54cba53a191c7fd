"""A training run from top to bottom: read, check, load, then evaluate → save → step → log until done, then export."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from peftune.config.recipe import Recipe
from peftune.console import Console
from peftune.device import choose_precision, device_name, peak_memory, report_out_of_memory
from peftune.errors import CheckFailed, Interrupted, UserError
from peftune.model.load import DTYPES, NAME_OF, footprint, load_adapted
from peftune.model.lora import Adapted
from peftune.model.loss import LossModel
from peftune.training import checkpoint
from peftune.training.checkpoint import Checkpoint, State
from peftune.training.distributed import start, zero
from peftune.training.distributed.agreement import refuse_different_ranks
from peftune.training.distributed.collectives import (
    all_gather,
    broadcast,
    raise_on_all_ranks,
    report_after_a_signal,
)
from peftune.training.distributed.signals import StopNow, StopRequest
from peftune.training.export.adapter import Delivery, deliver, earlier_run
from peftune.training.health import Health, what_broke
from peftune.training.inputs import RunInputs, read_inputs_on_all_ranks
from peftune.training.metrics import MetricsLog
from peftune.training.optimizer import Gradient, ReplicatedStrategy, UpdateStrategy, build_adamw, first_loss_scale
from peftune.training.planning.plan import tensors_at_most
from peftune.training.planning.trace import first_micro_size
from peftune.training.run_directory import sole_writer
from peftune.training.samples import continue_prompts
from peftune.training.step import ForwardFn, NotFinite, StepResult, choose_forward, evaluate_domain, train_step


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


def train(recipe: Recipe) -> Delivery:
    """Train the adapter that a recipe describes and write its directory; goes on where an earlier run was cut.

    Raises UserError for input that cannot work, Interrupted after a signal (a checkpoint is saved first), CheckFailed
    for numbers that are not finite or an adapter that did not learn, RankLost where another rank is gone.
    """
    if not isinstance(recipe, Recipe):
        raise UserError(f"train is given {type(recipe).__name__}, expected a Recipe: load_recipe reads one from a file")
    with start.watched_ranks(recipe) as accelerator, report_out_of_memory():
        console = Console(accelerator.is_main_process)
        if start.zero_stage(accelerator):
            zero.configure(accelerator, recipe)
        if idle := start.idle_gpus(accelerator):
            console.say(f"{idle} more GPUs here are not used: one process takes one; accelerate launch starts more")
        with raise_on_all_ranks(accelerator):
            precision = choose_precision(recipe.run.precision, accelerator.device.type == "cuda")
        refuse_different_ranks(accelerator, {"precision": precision})
        dtype = DTYPES[precision]
        inputs = read_inputs_on_all_ranks(recipe, accelerator)
        with sole_writer(Path(recipe.run.out), accelerator):
            found = broadcast(accelerator, lambda: earlier_run(inputs, console))
            if isinstance(found, Delivery):
                console.say(f"{recipe.run.out}: this recipe was trained already, nothing to do")
                return found
            run = load_run(inputs, accelerator, dtype, console, found)
            with run.metrics.closed_at_the_end(run.state), run.stop as stop, report_after_a_signal(stop):
                _begin(run, found)
                with console.progress:
                    _loop(run, stop)
                delivery = export(run)
            if run.metrics.lost:
                console.say(run.metrics.lost)
            return delivery


def load_run(
    inputs: RunInputs, accelerator: Accelerator, dtype: torch.dtype, console: Console, found: Checkpoint | None = None
) -> Run:
    """Load the base, put the adapter on it, build forward and optimizer, open the metrics."""
    recipe, program = inputs.recipe, psutil.Process().memory_info().rss if accelerator.device.type == "cpu" else 0
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
            adapted = load_adapted(recipe, inputs.base, dtype, accelerator.device, inputs.settings)
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
    health, stop = Health(inputs, adapted.model, accelerator, state, metrics, console), StopRequest()
    first = (inputs, accelerator, console, adapted, forward, health, gradient)
    return Run(*first, strategy, state, metrics, stop, program)


def _begin(run: Run, found: Checkpoint | None) -> None:
    """Go on from the checkpoint, if there is one; say and record what is about to be trained."""
    recipe, train, state, forward = run.inputs.recipe, run.inputs.corpus.train, run.state, run.forward
    facts, base = _facts(run), footprint(run.adapted.model)
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
    for note in run.inputs.notes():
        run.console.say(note)
    run.console.say(run.inputs.description(state.micro_size))
    run.console.say(
        f"{facts['trainable_parameters']:,} trainable parameters, {facts['precision']}, {facts['layout']}, "
        f"{facts['device']}; {forward.description}"
    )
    if recipe.quantize is not None:
        run.console.say(base.description(recipe.quantize))


def _facts(run: Run) -> dict[str, Any]:
    """How the run computes, for its metrics and its provenance."""
    facts = {"precision": NAME_OF[run.forward.dtype], "layout": start.layout(run.accelerator)}
    facts["device"] = device_name(run.accelerator.device)
    return facts | {"trainable_parameters": run.gradient.trained}


def _loop(run: Run, stop: StopRequest) -> None:
    inputs, state, save_every, total = run.inputs, run.state, run.inputs.recipe.run.save_every, run.inputs.total_steps
    progress = run.console.progress
    task = progress.add_task("step", total=total, completed=state.step, note="")
    began, saved_step = time.monotonic() - state.seconds, state.step if state.records_bytes else -1
    predicted = 0
    try:
        while True:
            better = _evaluate_if_due(run, stop)
            finished = state.step == total or run.health.has_stopped_improving()
            state.seconds = time.monotonic() - began
            due = save_every and state.step % save_every == 0 < state.step
            if saved_step != state.step and (better or finished or due):
                _save(run)
                saved_step = state.step
            if finished:
                return run.health.at_the_end(predicted)
            started = time.monotonic()
            done = _step(run, saved_step)
            state.step += 1
            state.tokens += done.tokens
            rate = done.tokens / (time.monotonic() - started)
            run.metrics.write(
                "train", step=state.step, loss=done.loss, lr=done.lr, grad_norm=done.grad_norm, tokens=state.tokens,
                tokens_per_second=round(rate, 1), peak_memory_bytes=peak_memory(run.accelerator.device),
            )  # fmt: skip
            if not predicted:
                predicted = _log_memory(run)
            run.health.after_step(done.loss)
            note = f"loss {done.loss:.3f}  lr {done.lr:.1e}  {rate:,.0f} tok/s"
            progress.update(task, completed=state.step, note=note)
    except StopNow:
        state.seconds = time.monotonic() - began
        if saved_step != state.step:
            _save(run)
        raise Interrupted(
            f"{stop.name or 'a signal to another rank'} after step {state.step} of {total}: checkpoint saved in "
            f"{inputs.recipe.run.out}/checkpoints; the same command goes on from there"
        ) from None


def _step(run: Run, saved_step: int) -> StepResult:
    """One step; where its numbers are broken, the error tells what did it, and a state that is good is saved."""
    state, checkpoints = run.state, Path(run.inputs.recipe.run.out) / "checkpoints"
    try:
        return train_step(
            run.inputs, state, run.forward, run.gradient, run.strategy, run.accelerator, run.stop, run.console
        )
    except NotFinite as error:
        reason, is_good = what_broke(run.inputs, state, run.forward, run.gradient, run.accelerator)
        if is_good and saved_step != state.step:
            _save(run)
        saved = [str(path) for path in checkpoint.listed(checkpoints)] or ["none was saved (run.save_every)"]
        raise CheckFailed(f"{error}: {reason}; the last good state: {saved[-1]}") from None


def _evaluate_if_due(run: Run, stop: StopRequest) -> bool:
    """Score every domain and continue the samples, when it is time; whether the loss is the lowest so far."""
    inputs, state, total, every = run.inputs, run.state, run.inputs.total_steps, run.inputs.recipe.run.eval_every
    due = state.step in (0, total) or (every and state.step % every == 0)
    if not due or state.evaluated_step == state.step:
        return False
    scores = {
        name: evaluate_domain(name, blocks, run.forward, run.accelerator, stop, run.console)
        for name, blocks in inputs.corpus.domains.items()
    }
    prompts, model = inputs.recipe.run.samples, run.adapted.model
    parse, tokenizer = inputs.recipe.data.special_tokens == "parse", inputs.tokenizer
    samples = continue_prompts(prompts, model, tokenizer, parse, run.forward, run.accelerator, stop) if prompts else []
    return run.health.after_evaluation(scores, samples)


def _save(run: Run) -> None:
    values, moments = run.strategy.state_dict()
    with raise_on_all_ranks(run.accelerator):
        run.metrics.flush(run.state)
        if run.accelerator.is_main_process:
            folder = Path(run.inputs.recipe.run.out) / "checkpoints"
            checkpoint.save(folder, Checkpoint(run.state, values, moments))


def _log_memory(run: Run) -> int:
    """Once a start, after the first step has made the optimizer's state: the memory of each rank; the peak foreseen."""
    gradient, peak = run.gradient.flat.nbytes, peak_memory(run.accelerator.device)
    here = run.strategy.memory_bytes(run.adapted.model) | {"gradient": gradient, "peak": peak}
    every, predicted = all_gather(run.accelerator, here), tensors_at_most(run.inputs, run.forward, run.accelerator)
    predicted += run.program
    run.metrics.write("memory", step=run.state.step, bytes_per_rank=every, predicted_peak_bytes=predicted)
    return predicted


def export(run: Run) -> Delivery:
    """Have the first rank write the adapter; Interrupted, on all ranks, where a signal came to it."""
    values, _ = run.strategy.state_dict()
    facts = _facts(run)

    def write() -> Delivery:
        try:
            with run.stop.at_once():
                return deliver(run.inputs, run.adapted, values, run.state, run.metrics, facts)
        except StopNow:
            raise Interrupted(
                f"{run.stop.name} before the adapter was written: training is complete and its checkpoint saved in "
                f"{run.inputs.recipe.run.out}/checkpoints; the same command writes the adapter"
            ) from None

    return broadcast(run.accelerator, write)
