"""The members of a fleet: their names, what each reads, which of them can learn side by side, and how each ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from peftune.config.fleet import names_of
from peftune.config.recipe import Recipe
from peftune.console import Console
from peftune.errors import CheckFailed, PeftuneError, UserError
from peftune.model.load import needs_exact_base
from peftune.training.checkpoint import Checkpoint, State
from peftune.training.export.adapter import Delivery
from peftune.training.inputs import RunInputs
from peftune.training.loading import Run
from peftune.training.planning.memory_model import shapes_of

Outcome = Delivery | State | PeftuneError
"""A finished adapter, where a run stands that was paused, or what ended it."""
_OWN = (UserError.exit_code, CheckFailed.exit_code)  # of errors that concern one member


@dataclass
class Member:
    """One adapter of a fleet, from its recipe to its end."""

    recipe: Recipe
    console: Console
    inputs: RunInputs | None = None
    dtype: torch.dtype = torch.float32
    """That it computes in, once it has read its inputs."""
    found: Checkpoint | None = None
    run: Run | None = None
    outcome: Outcome | None = None
    held: ExitStack = field(default_factory=ExitStack)
    """What it gives back when it ends: its directory's lock, its metrics."""

    @property
    def ready(self) -> RunInputs:
        """What it has read."""
        assert self.inputs is not None
        return self.inputs

    @property
    def running(self) -> Run:
        """Its run, once it is loaded."""
        assert self.run is not None
        return self.run

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """What is wrong with this member alone ends it, and nobody else.

        All ranks meet such an error at the same place.
        """
        try:
            yield
        except PeftuneError as error:
            if error.exit_code not in _OWN:
                raise
            self.end(error)

    def end(self, outcome: Outcome) -> None:
        """Note how it ended and give back what it held."""
        self.outcome = outcome
        if self.run is not None and isinstance(outcome, PeftuneError):
            self.run.metrics.note_failure(outcome, self.run.state.step)
        try:
            self.held.close()
        finally:
            self.run = None  # and with it its memory
        if isinstance(outcome, PeftuneError) and str(outcome):
            self.console.say(str(outcome))


def members_of(recipes: Sequence[Recipe], console: Console) -> list[Member]:
    """Each with a name of its own."""
    return [Member(recipe, console.named(name)) for name, recipe in zip(names_of(recipes), recipes, strict=True)]


@dataclass(frozen=True)
class Group:
    """Members that learn side by side over one base, in one precision; `reason` says why no others are among them."""

    members: list[Member]
    dtype: torch.dtype
    reason: str = ""

    def names(self) -> str:
        """Of its members."""
        return ", ".join(member.console.name for member in self.members)


def grouped(members: Sequence[Member]) -> list[Group]:
    """The members in groups that share base, its format, precision, block size and ways to compute; in their order."""
    groups: dict[object, Group] = {}
    for member in members:
        inputs = member.ready
        run, identity = inputs.recipe.run, inputs.base.identity()
        reason = why_alone(inputs)
        facts = (
            *sorted((key, str(value)) for key, value in identity.items()), inputs.recipe.quantize, member.dtype,
            inputs.corpus.train.packing.block_size, run.checkpointing, run.compile,
        )  # fmt: skip
        key = member.console.name if reason else facts
        groups.setdefault(key, Group([], member.dtype, reason)).members.append(member)
    return list(groups.values())


def parts_that_fit(group: Group, room: int) -> list[Group]:
    """The group in parts whose adapters, their gradients and moments fit into so many bytes; in the same order."""
    parts: list[list[Member]] = []
    left, known = 0, dict[str, int]()
    for member in group.members:
        config, lora = member.ready.base.config, member.ready.recipe.lora
        if (key := lora.model_dump_json()) not in known:  # a skeleton of the model is built
            known[key] = 16 * shapes_of(config, lora).adapter
        if not parts or known[key] > left:
            parts.append([])
            left = room
        parts[-1].append(member)
        left -= known[key]
    reason = group.reason if len(parts) == 1 else "memory holds no more adapters at a time"
    return [Group(part, group.dtype, reason) for part in parts]


def why_alone(inputs: RunInputs) -> str:
    """Why an adapter cannot share forwards with others, or nothing."""
    recipe, settings = inputs.recipe, inputs.settings
    if not recipe.run.fast:
        return "run.fast is false"
    if recipe.run.base_dropout:
        return "run.base_dropout"
    if needs_exact_base(recipe) or (settings is not None and (settings.lora_bias or settings.use_dora)):
        return "it trains more than A and B of the blocks' linear layers, or starts from the base's exact weights"
    return ""
