"""Several adapters in one run: each is what it would have become alone, and none notices how another ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator

from peftune.config.fleet import refuse_company
from peftune.config.recipe import Recipe
from peftune.console import Console, counted
from peftune.device import peak_memory, report_out_of_memory
from peftune.errors import CheckFailed, Interrupted, PeftuneError, ReportedElsewhere, UserError, refuse_bare_string
from peftune.model.load import KERNELS_KEPT, keep_kernels, load_base, with_the_same_weights
from peftune.model.train import grouped_lora
from peftune.training.distributed import start
from peftune.training.distributed.collectives import (
    all_gather,
    all_reduce_sum,
    broadcast,
    raise_on_all_ranks,
    report_after_a_signal,
)
from peftune.training.distributed.signals import StopNow, StopRequest
from peftune.training.export.adapter import Delivery, earlier_run
from peftune.training.fleet.members import Group, Member, Outcome, grouped, members_of, parts_that_fit
from peftune.training.fleet.shared_room import SharedRoom
from peftune.training.inputs import RunInputs, read_inputs_on_all_ranks
from peftune.training.loading import Shared, begin, bytes_of_program, facts_of, load_run
from peftune.training.planning.memory_model import shapes_of
from peftune.training.planning.plan import grown_at_most, usable_memory
from peftune.training.planning.trace import most_blocks
from peftune.training.run import after_step, before_step, blamed, export, save, save_after_signal, start_course
from peftune.training.run_directory import sole_writer
from peftune.training.step import NotFinite, steps_together

_CPU_TOKENS = 2048  # of a forward that several adapters share
_CPU_ADAPTERS, MOST_KERNELS, _KERNEL = 8, 448, 1_100_000
"""Of a forward in 16 bits on a CPU, for which oneDNN makes kernels for each number of rows: 48 or so for each whose
documents have lengths of their own. As many are kept, of so many bytes, that all layers of a forward find theirs."""


def train_fleet(recipes: Sequence[Recipe], until: float = 1.0) -> list[Outcome]:
    """Train the adapters of several recipes; how each ended, in the order of the recipes.

    Those that share base, quantisation, precision and block size learn side by side: the base is held once, and
    products with it are made once for all. Each adapter equals what `train` makes of its recipe, to rounding, and so
    does its directory; either goes on from what the other left. One that fails, diverges or stops early leaves, and
    its error is its outcome. With `until` below 1 each is paused at its first evaluation from that share of its steps
    on, with a checkpoint, and its state is its outcome; the next call goes on from there.

    Raises UserError for recipes that cannot be trained in one process, Interrupted after a signal (checkpoints are
    saved first), RankLost where another rank is gone.
    """
    refuse_bare_string(recipes, "recipes")
    if not recipes:
        raise UserError("a fleet needs at least one recipe")
    for recipe in recipes:
        if not isinstance(recipe, Recipe):
            raise UserError(f"train_fleet is given {type(recipe).__name__}, expected a Recipe: load_recipes reads them")
    refuse_company(recipes)
    keep_kernels(len(recipes), MOST_KERNELS)
    with start.watched_ranks(*recipes) as accelerator, report_out_of_memory():
        if start.zero_stage(accelerator):
            raise UserError("ZeRO shards the state of one adapter; a fleet runs on one process or on ranks with DDP")
        console = Console(accelerator.is_main_process)
        members = members_of(recipes, console)
        for member in members:
            with member.own_errors():
                _read(member, members, accelerator)
        try:
            for member in members:
                with member.own_errors():
                    _claim(member, accelerator)
            of_a_kind = grouped([member for member in members if member.outcome is None])
            groups = [part for group in of_a_kind for part in _parts(group, accelerator)]
            for group in groups:
                if len(groups) > 1:
                    alone = " alone" if len(group.members) == 1 else ""
                    console.stage(f"{group.names()}{f'{alone}: {group.reason}' if group.reason else ''}")
                _train_group(group, accelerator, console, until)
        finally:
            for member in members:
                member.held.close()
        return [_heard(member.outcome, accelerator) for member in members if member.outcome is not None]


def _heard(outcome: Outcome, accelerator: Accelerator) -> Outcome:
    """An error is told by the first rank."""
    if isinstance(outcome, PeftuneError) and not accelerator.is_main_process:
        return ReportedElsewhere(outcome.exit_code, str(outcome))
    return outcome


def _read(member: Member, members: Sequence[Member], accelerator: Accelerator) -> None:
    """Read what a member starts from, once for all that read the same."""
    member.dtype = start.agreed_dtype(member.recipe, accelerator)
    known = [other.inputs for other in members if other.inputs is not None]
    member.inputs = read_inputs_on_all_ranks(member.recipe, accelerator, known)


def _claim(member: Member, accelerator: Accelerator) -> None:
    """Lock a member's directory, and see what an earlier run left there."""
    if member.outcome is not None:
        return
    member.held.enter_context(sole_writer(Path(member.recipe.run.out), accelerator))
    found = broadcast(accelerator, lambda: earlier_run(member.ready, member.console))
    if isinstance(found, Delivery):
        member.console.say("this recipe was trained already, nothing to do")
        member.end(found)
    else:
        member.found = found


def _train_group(group: Group, accelerator: Accelerator, console: Console, until: float) -> None:
    """Train members to their ends, side by side where there are several."""
    together, stop, program = len(group.members) > 1, StopRequest(), bytes_of_program(accelerator)
    first, shared = group.members[0].ready, None
    if together:
        with raise_on_all_ranks(accelerator):
            model = load_base(first.recipe, first.base, group.dtype, accelerator.device)
        shared = Shared(partial(with_the_same_weights, model), stop, program)
    for member in group.members:
        with member.own_errors():
            given = member.ready, accelerator, group.dtype, member.console, member.found, shared
            member.run = load_run(*given)
            member.run.metrics.defers = True
            member.held.callback(member.run.metrics.close)
    live = [member for member in group.members if member.outcome is None]
    if not live:
        return
    stop = stop if together else live[0].running.stop
    with stop, report_after_a_signal(stop):
        room = None
        if together:
            room = room_of(live, accelerator)
            console.say(_description(live, room))
            foreseen = cache(partial(_foreseen, [member.ready for member in live], room, group.dtype, accelerator))
            for member in live:
                member.running.course.foreseen = lambda: foreseen() + program
        told: set[int] = set()
        for member in live:
            with member.own_errors():
                begin(member.running, member.found, brief=together, notes=id(member.ready.corpus) not in told)
                told.add(id(member.ready.corpus))
        with console.progress, _saved_after_a_signal(live, stop):
            for member in live:
                if member.outcome is None:
                    start_course(member.running)
            while live := [member for member in live if member.outcome is None]:
                _round(live, room, accelerator, console, until)
    if together:
        most, predicted = peak_memory(accelerator.device), foreseen() + program
        console.say(f"memory at most {most / 1e9:.2f} GB; predicted {predicted / 1e9:.2f} GB")


def _round(
    live: Sequence[Member], room: SharedRoom | None, accelerator: Accelerator, console: Console, until: float
) -> None:
    """Let each member evaluate, save and end where that is due, then all others take a step."""
    _end_where_metrics_fail(live, accelerator)
    if (sums := live[0].running.health.sums) is not None:
        sums.clear()  # of the round before
    for member in live:
        with member.own_errors():
            if member.outcome is None:
                _before_step(member, until)
    stepping = [member for member in live if member.outcome is None]
    if not stepping:
        return
    started, stop = time.monotonic(), stepping[0].running.stop
    taken = steps_together([member.running.learner for member in stepping], accelerator, stop, console, room)
    seconds = time.monotonic() - started
    for member, done in zip(stepping, taken, strict=True):
        with member.own_errors():
            if isinstance(done, NotFinite):
                raise blamed(member.running, done)
            if isinstance(done, CheckFailed):
                raise done
            after_step(member.running, done, seconds)


def _before_step(member: Member, until: float) -> None:
    run, state = member.running, member.running.state
    if before_step(run):
        run.health.at_the_end(0)
        delivery = export(run)
        if run.metrics.lost:
            run.console.say(run.metrics.lost)
        member.end(delivery)
    elif state.evaluated_step == state.step >= max(1, until * run.inputs.total_steps):
        if run.course.saved_step != state.step:
            save(run)
        member.end(state)


def _end_where_metrics_fail(live: Sequence[Member], accelerator: Accelerator) -> None:
    """The first rank alone writes metrics; where that fails, all ranks learn of it here."""
    broken = [member.running.metrics.broken for member in live]
    (failures,) = all_reduce_sum(accelerator, float(any(broken)))
    if failures:
        for member, error in zip(live, all_gather(accelerator, broken)[0], strict=True):
            if error is not None:
                member.end(error)


@contextmanager
def _saved_after_a_signal(members: Sequence[Member], stop: StopRequest) -> Iterator[None]:
    """Checkpoints of all members that are still learning when a signal came; then Interrupted."""
    try:
        yield
    except (StopNow, PeftuneError) as error:
        if isinstance(error, PeftuneError) and error.exit_code != Interrupted.exit_code:
            raise
        learning = [member for member in members if member.outcome is None]
        for member in learning:
            with member.own_errors():
                save_after_signal(member.running)
        raise Interrupted(
            f"{stop.name or 'a signal to another rank'}: checkpoints of {counted(len(learning), 'adapter')} saved "
            f"({', '.join(f'{m.console.name} at step {m.running.state.step}' for m in learning if m.run)}); the same "
            "command goes on from there"
        ) from None


def _parts(group: Group, accelerator: Accelerator) -> list[Group]:
    """The group in parts whose adapters fit into memory beside base and smallest forward; alike on all ranks."""
    if len(group.members) == 1:
        return [group]
    sizes = [member.recipe.batch.micro_size for member in group.members]
    blocks = max(size if isinstance(size, int) else 1 for size in sizes)
    taken = grown_at_most(group.members[0].ready, group.dtype, blocks, accelerator)
    return parts_that_fit(group, min(all_gather(accelerator, usable_memory(accelerator) - taken)))


def room_of(live: Sequence[Member], accelerator: Accelerator) -> SharedRoom:
    """As many blocks a forward as gain something and fit, at least each member's micro-batch.

    On a CPU the gain is that small products become large ones, which they are with one or two thousand rows
    (`python -m benchmarks.fleet sizes`); more of them leave its caches.
    """
    first, runs = live[0].ready, [member.running for member in live]
    ranks, kind = accelerator.num_processes, accelerator.device.type
    fitting = most_blocks(first, runs[0].forward.dtype, start.way_of(accelerator), ranks, kind)
    if kind == "cpu":
        fitting = min(fitting, _CPU_TOKENS // first.corpus.train.packing.block_size)
    blocks = max(fitting, *(run.state.micro_size for run in runs))
    most = _CPU_ADAPTERS if kind == "cpu" and runs[0].forward.dtype.itemsize == 2 else len(runs)
    return SharedRoom.of([run.gradient for run in runs], min(all_gather(accelerator, blocks)), most)


def _foreseen(inputs: Sequence[RunInputs], room: SharedRoom, dtype: torch.dtype, accelerator: Accelerator) -> int:
    """Bytes by which a rank grows, at most: the base and a forward once, values, gradient and moments of all."""
    first, ranks = inputs[0], accelerator.num_processes
    of_steps = sum(-(-min(one.recipe.batch.global_size, len(one.corpus.train)) // ranks) for one in inputs)
    others = 16 * (room.gradient.numel() - shapes_of(first.base.config, first.recipe.lora).adapter)
    if accelerator.device.type == "cpu" and dtype.itemsize == 2:
        of_one = int(KERNELS_KEPT["LRU_CACHE_CAPACITY"])
        others += (min(MOST_KERNELS, len(inputs) * of_one) - of_one) * _KERNEL
    return grown_at_most(first, dtype, min(room.blocks, of_steps), accelerator, others)


def _description(live: Sequence[Member], room: SharedRoom) -> str:
    """How they learn side by side."""
    run, inputs = live[0].running, live[0].ready
    facts, trained = facts_of(run), sum(member.running.gradient.trained for member in live)
    room_text = f"up to {counted(room.blocks, 'block')} of {inputs.corpus.train.packing.block_size} a forward"
    assert run.forward.fast is not None, "adapters share forwards of the fast kind alone"
    products = grouped_lora.description(run.forward.fast.wte.device, run.forward.dtype)
    return (
        f"{len(live)} adapters side by side over {inputs.recipe.base}: {trained:,} trainable parameters, "
        f"{facts['precision']}, {facts['layout']}, {facts['device']}; "
        f"{', '.join(filter(None, (run.forward.description, products, room_text)))}"
    )
