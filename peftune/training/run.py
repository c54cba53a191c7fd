"""A training run from top to bottom: read, check, load, then evaluate → save → step → log until done, then export."""

from __future__ import annotations

import time
from pathlib import Path

from peftune.config.recipe import Recipe
from peftune.console import Console
from peftune.device import peak_memory, report_out_of_memory
from peftune.errors import CheckFailed, Interrupted, PeftuneError, UserError
from peftune.inference.perplexity import Score
from peftune.training import checkpoint
from peftune.training.broken_step import what_broke
from peftune.training.checkpoint import Checkpoint
from peftune.training.distributed import start, zero
from peftune.training.distributed.collectives import (
    all_gather,
    broadcast,
    raise_on_all_ranks,
    report_after_a_signal,
)
from peftune.training.distributed.signals import StopNow
from peftune.training.export.adapter import Delivery, deliver, earlier_run
from peftune.training.inputs import read_inputs_on_all_ranks
from peftune.training.loading import Run, begin, facts_of, load_run
from peftune.training.planning.plan import tensors_at_most
from peftune.training.run_directory import sole_writer
from peftune.training.step import NotFinite, StepResult, train_step
from peftune.training.validation import continue_prompts, evaluate_domain


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
        dtype = start.agreed_dtype(recipe, accelerator)
        inputs = read_inputs_on_all_ranks(recipe, accelerator)
        with sole_writer(Path(recipe.run.out), accelerator):
            found = broadcast(accelerator, lambda: earlier_run(inputs, console))
            if isinstance(found, Delivery):
                console.say(f"{recipe.run.out}: this recipe was trained already, nothing to do")
                return found
            run = load_run(inputs, accelerator, dtype, console, found)
            try:
                with run.stop as stop, report_after_a_signal(stop):
                    begin(run, found)
                    with console.progress:
                        start_course(run)
                        _loop(run)
                    delivery = export(run)
            except PeftuneError as error:
                run.metrics.note_failure(error, run.state.step)
                raise
            finally:
                run.metrics.close()
            if run.metrics.lost:
                console.say(run.metrics.lost)
            return delivery


def start_course(run: Run) -> None:
    """Set the clock and show the bar."""
    course, state, progress = run.course, run.state, run.console.progress
    course.began = time.monotonic() - state.seconds
    course.saved_step = state.step if state.records_bytes else -1
    course.task = progress.add_task(
        run.console.name or "step", total=run.inputs.total_steps, completed=state.step, note=""
    )


def _loop(run: Run) -> None:
    try:
        while not before_step(run):
            started = time.monotonic()
            after_step(run, _step(run), time.monotonic() - started)
    except StopNow:
        save_after_signal(run)
        raise Interrupted(
            f"{run.stop.name or 'a signal to another rank'} after step {run.state.step} of {run.inputs.total_steps}: "
            f"checkpoint saved in {run.inputs.recipe.run.out}/checkpoints; the same command goes on from there"
        ) from None
    run.health.at_the_end(run.course.predicted)


def before_step(run: Run) -> bool:
    """Evaluate and save where that is due; whether the run has come to its end."""
    state, course, save_every = run.state, run.course, run.inputs.recipe.run.save_every
    better = _evaluate_if_due(run)
    finished = state.step == run.inputs.total_steps or run.health.has_stopped_improving()
    state.seconds = time.monotonic() - course.began
    due = save_every and state.step % save_every == 0 < state.step
    if course.saved_step != state.step and (better or finished or due):
        save(run)
    return bool(finished)


def after_step(run: Run, done: StepResult, seconds: float) -> None:
    """Count a step that was taken, record and judge it."""
    state, device = run.state, run.accelerator.device
    state.step += 1
    state.tokens += done.tokens
    rate = done.tokens / seconds
    run.metrics.write(
        "train", step=state.step, loss=done.loss, lr=done.lr, grad_norm=done.grad_norm, tokens=state.tokens,
        tokens_per_second=round(rate, 1), peak_memory_bytes=peak_memory(device),
    )  # fmt: skip
    if not run.course.predicted:
        run.course.predicted = _log_memory(run)
    run.health.after_step(done.loss)
    note = f"loss {done.loss:.3f}  lr {done.lr:.1e}  {rate:,.0f} tok/s"
    run.console.progress.update(run.course.task, completed=state.step, note=note)


def save_after_signal(run: Run) -> None:
    """The checkpoint that a run which was told to stop goes on from."""
    run.state.seconds = time.monotonic() - run.course.began
    if run.course.saved_step != run.state.step:
        save(run)


def _step(run: Run) -> StepResult:
    try:
        return train_step(run.learner, run.accelerator, run.stop, run.console)
    except NotFinite as error:
        raise blamed(run, error) from None


def blamed(run: Run, error: NotFinite) -> CheckFailed:
    """The error of broken numbers with what did it; a state that is good is saved."""
    reason, is_good = what_broke(run.inputs, run.state, run.forward, run.gradient, run.accelerator)
    if is_good and run.course.saved_step != run.state.step:
        save(run)
    checkpoints = checkpoint.listed(Path(run.inputs.recipe.run.out) / "checkpoints")
    saved = [str(path) for path in checkpoints] or ["none was saved (run.save_every)"]
    return CheckFailed(f"{error}: {reason}; the last good state: {saved[-1]}")


def _evaluate_if_due(run: Run) -> bool:
    """Score every domain and continue the samples, when it is time; whether the loss is the lowest so far."""
    inputs, state, total, every = run.inputs, run.state, run.inputs.total_steps, run.inputs.recipe.run.eval_every
    due = state.step in (0, total) or (every and state.step % every == 0)
    if not due or state.evaluated_step == state.step:
        return False
    scores, known = dict[str, Score](), run.base_scores if state.step == 0 else None
    known = {} if known is None else known
    for name, blocks in inputs.corpus.domains.items():
        if id(blocks) not in known:
            known[id(blocks)] = evaluate_domain(name, blocks, run.forward, run.accelerator, run.stop, run.console)
        scores[name] = known[id(blocks)]
    prompts, model = inputs.recipe.run.samples, run.adapted.model
    parse, tokenizer = inputs.recipe.data.special_tokens == "parse", inputs.tokenizer
    given = prompts, model, tokenizer, parse, run.forward, run.accelerator, run.stop
    samples = continue_prompts(*given) if prompts else []
    return run.health.after_evaluation(scores, samples)


def save(run: Run) -> None:
    """Write a checkpoint of this step."""
    values, moments = run.strategy.state_dict()
    with raise_on_all_ranks(run.accelerator):
        run.metrics.flush(run.state)
        if run.accelerator.is_main_process:
            folder = Path(run.inputs.recipe.run.out) / "checkpoints"
            checkpoint.save(folder, Checkpoint(run.state, values, moments))
    run.course.saved_step = run.state.step


def _log_memory(run: Run) -> int:
    """Once a start, after the first step has made the optimizer's state: the memory of each rank; the peak foreseen."""
    gradient, peak = run.gradient.flat.nbytes, peak_memory(run.accelerator.device)
    here = run.strategy.memory_bytes(run.adapted.model) | {"gradient": gradient, "peak": peak}
    every, foreseen = all_gather(run.accelerator, here), run.course.foreseen
    if foreseen is None:
        predicted = tensors_at_most(run.inputs, run.forward, run.accelerator) + run.program
    else:
        predicted = foreseen()
    run.metrics.write("memory", step=run.state.step, bytes_per_rank=every, predicted_peak_bytes=predicted)
    return predicted


def export(run: Run) -> Delivery:
    """Have the first rank write the adapter; Interrupted, on all ranks, where a signal came to it."""
    values, _ = run.strategy.state_dict()
    facts = facts_of(run)

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
