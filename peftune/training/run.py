"""A training run from top to bottom: read, check, load, then evaluate → save → learn until done, then deliver."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftune.config.recipe import Recipe
from peftune.console import Console
from peftune.errors import Interrupted, UserError, report_once_per_machine
from peftune.model.load import DTYPES, footprint
from peftune.training import checkpoint, evaluation, identity
from peftune.training.checkpoint import Checkpoint, State
from peftune.training.distributed import zero
from peftune.training.distributed.collectives import (
    all_gather,
    broadcast,
    raise_on_all_ranks,
    report_on_rank0,
    translate_peer_errors,
)
from peftune.training.distributed.replicated import bytes_of
from peftune.training.distributed.signals import StopRequest
from peftune.training.distributed.watchdog import rendezvous_deadline, watch_peers
from peftune.training.export.adapter import Delivery, already_delivered, deliver
from peftune.training.memory import peak_memory
from peftune.training.metrics import refuse_missing_trackers
from peftune.training.micro import first_micro_size
from peftune.training.precision import FIRST_LOSS_SCALE, choose_precision
from peftune.training.setup import RunInputs, Session, assemble, read_together, sole_writer
from peftune.training.step import StepResult, StopNow, train_step

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(recipe: Recipe) -> Delivery:
    """Train the adapter that a recipe describes and write its directory; goes on where an earlier run was cut.

    Raises UserError for input that cannot work, Interrupted after a signal (a checkpoint is saved first), CheckFailed
    for numbers that are not finite or an adapter that did not learn, RankLost where another rank is gone.
    """
    with report_once_per_machine(), rendezvous_deadline():
        refuse_missing_trackers(list(recipe.run.track))
        accelerator = zero.start(list(recipe.run.track), recipe.run.out)
    with (
        report_on_rank0(accelerator),
        translate_peer_errors(accelerator),
        watch_peers(accelerator),
        StopRequest() as stop,
    ):
        display = Console(accelerator.is_main_process)
        zero.configure(accelerator, recipe)
        idle = zero.idle_gpus(accelerator)
        if idle:
            display.say(f"{idle} more GPUs here are not used: one process takes one; accelerate launch starts more")
        dtype = DTYPES[choose_precision(recipe.run.precision, accelerator.device.type == "cuda")]
        source = read_together(recipe, accelerator)
        with sole_writer(Path(recipe.run.out), accelerator):
            found = broadcast(accelerator, lambda: _standing(recipe, source))
            if isinstance(found, Delivery):
                display.say(f"{recipe.run.out}: this recipe was trained already, nothing to do")
                return found
            return _train(source, accelerator, dtype, display, found, stop)


def _train(
    source: RunInputs,
    accelerator: Accelerator,
    dtype: torch.dtype,
    display: Console,
    found: Checkpoint | None,
    stop: StopRequest,
) -> Delivery:
    state = found.state if found else State(loss_scale=FIRST_LOSS_SCALE if dtype == torch.float16 else 1.0)
    if source.recipe.batch.micro_size != "auto" or not state.micro_size:
        mine = _micro_size(source, accelerator.num_processes, dtype, accelerator.device)
        state.micro_size = min(all_gather(accelerator, mine))
    session = assemble(source, accelerator, dtype, display, state)
    _begin(session, found)
    try:
        with display.progress:
            _loop(session, stop)
        delivery = deliver(session)
        display.say(delivery.summary())
        return delivery
    finally:
        session.records.close()


def _standing(recipe: Recipe, source: RunInputs) -> Delivery | Checkpoint | None:
    """What an earlier run of this recipe left: a finished adapter, a checkpoint to go on from, or nothing."""
    out = Path(recipe.run.out)
    done = already_delivered(out, source.identity)
    if done is not None:
        return done
    found = checkpoint.newest(out / "checkpoints")
    if found is None:
        return None
    if recipe.run.resume == "never":
        raise UserError(f"{out}/checkpoints: a run is there, and run.resume is never; use auto, or another run.out")
    identity.refuse_other(found.state.identity, source.identity, str(out))
    return found


def _micro_size(source: RunInputs, ranks: int, dtype: torch.dtype, device: torch.device) -> int:
    batch, train = source.recipe.batch, source.corpus.train
    if batch.micro_size != "auto":
        return batch.micro_size
    per_rank = -(-min(batch.global_size, len(train)) // ranks)
    return first_micro_size(source.base.config, train.packing.block_size, per_rank, dtype, device)


def _begin(session: Session, found: Checkpoint | None) -> None:
    recipe, train, state = session.recipe, session.source.corpus.train, session.state
    layout = zero.layout(session.accelerator)
    held = footprint(session.adapted.model)
    numbers = {
        "blocks": len(train), "block_size": train.packing.block_size, "packing_fill": round(train.packing.fill(), 4),
        "tokens_per_epoch": train.tokens(), "total_steps": session.source.total_steps, "micro_size": state.micro_size,
        "trainable_parameters": session.trainable_parameters, "ranks": session.accelerator.num_processes,
        "layout": layout, "precision": session.precision, "function": session.function.told,
    }  # fmt: skip
    if not session.engine.forward_is_collective:  # else a rank holds a part; the event "memory" tells
        numbers |= {"base_bytes": held.held, "base_bytes_fp32": held.fp32, "base_bytes_bf16": held.bf16}
    if found is None:
        session.records.write("start", recipe=recipe.model_dump(mode="json"), **numbers)
    else:
        session.engine.restore(found.values, found.moments)
        session.records.write("resume", from_step=state.step, layout=layout)
        session.display.say(f"resuming {recipe.run.out} from step {state.step}")
    session.display.say(
        f"{train.tokens():,} tokens to learn in {len(train):,} blocks of {train.packing.block_size} "
        f"({train.packing.fill():.1%} full), {session.source.total_steps} steps of {recipe.batch.global_size} blocks "
        f"({state.micro_size} a forward), {session.trainable_parameters:,} trainable parameters, "
        f"{session.precision}, {layout}; {session.function.told}"
    )
    if recipe.quantize is not None:
        session.display.say(held.description(recipe.quantize))


def _loop(session: Session, stop: StopRequest) -> None:
    state, run, total = session.state, session.recipe.run, session.source.total_steps
    task = session.display.progress.add_task("training", total=total, completed=state.step, note="")
    began, saved_step = time.monotonic() - state.seconds, state.step if state.records_bytes else -1
    first_step = state.step + 1
    try:
        while True:
            better = _evaluate_if_due(session, stop, total)
            finished = state.step == total or _has_stopped_improving(session)
            state.seconds = time.monotonic() - began
            if saved_step != state.step and (
                better or finished or (run.save_every and state.step % run.save_every == 0 < state.step)
            ):
                _save(session)
                saved_step = state.step
            if finished:
                return
            started = time.monotonic()
            learnt = train_step(session, stop)
            state.step += 1
            state.tokens += learnt.tokens
            rate = learnt.tokens / (time.monotonic() - started)
            _log(session, learnt, rate)
            if state.step == first_step:
                _log_memory(session)
            session.display.progress.update(
                task, completed=state.step, note=f"loss {learnt.loss:.3f}  {rate:,.0f} tok/s"
            )
    except StopNow:
        state.seconds = time.monotonic() - began
        if saved_step != state.step:
            _save(session)
        raise Interrupted(
            f"{stop.name} after step {state.step} of {total}: checkpoint saved in {session.checkpoints}; "
            "the same command goes on from there"
        ) from None


def _evaluate_if_due(session: Session, stop: StopRequest, total: int) -> bool:
    state, every = session.state, session.recipe.run.eval_every
    due = state.step in (0, total) or (every and state.step % every == 0)
    if not due or state.evaluated_step == state.step:
        return False
    scores = evaluation.evaluate_domains(session, stop)
    evaluation.record(session, scores)
    evaluation.sample(session)
    return evaluation.improves(session, scores)


def _has_stopped_improving(session: Session) -> bool:
    patience = session.recipe.run.early_stopping
    if patience is None or session.state.evaluations_without_gain < patience:
        return False
    session.display.say(f"no better validation loss in {patience} evaluations: stopping at step {session.state.step}")
    return True


def _save(session: Session) -> None:
    state = session.state
    state.records_bytes = session.records.size()
    values, moments = session.engine.whole()
    with raise_on_all_ranks(session.accelerator):
        if session.accelerator.is_main_process:
            checkpoint.save(session.checkpoints, Checkpoint(state, values, moments))


def _log(session: Session, learnt: StepResult, rate: float) -> None:
    session.records.write(
        "train", step=session.state.step, loss=learnt.loss, lr=learnt.lr, grad_norm=learnt.grad_norm,
        tokens=session.state.tokens, tokens_per_second=round(rate, 1),
        peak_memory_bytes=peak_memory(session.accelerator.device),
    )  # fmt: skip


def _log_memory(session: Session) -> None:
    """Once a start, after the first step has made the optimizer's state: what each rank holds."""
    held = session.engine.held_bytes(session.adapted.model) | {"gradient": bytes_of(session.gradient.flat)}
    held["peak"] = peak_memory(session.accelerator.device)
    session.records.write("memory", step=session.state.step, bytes_per_rank=all_gather(session.accelerator, held))
