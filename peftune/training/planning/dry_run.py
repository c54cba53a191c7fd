"""What a run would do, without doing it: the recipe with its auto values, data, steps, memory, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftune.config.data_section import Source
from peftune.config.recipe import Recipe
from peftune.data.sources.read import read_documents
from peftune.device import choose_device, choose_precision
from peftune.errors import UserError
from peftune.model import quantized
from peftune.model.base import open_base
from peftune.model.load import DTYPES
from peftune.training.checkpoint import Checkpoint
from peftune.training.distributed.start import require_trackers
from peftune.training.distributed.zero import refuse_for_zero3
from peftune.training.export.adapter import Delivery, left_by_earlier_run
from peftune.training.inputs import RunInputs, read_inputs
from peftune.training.planning.memory_model import Format, RankMemory, Way, bytes_per_rank, shapes_of
from peftune.training.planning.trace import Device, activations, first_micro_size
from peftune.training.run_directory import check_writable


@dataclass(frozen=True)
class DryRun:
    """What `train` would start with; `recipe` has numbers where the one given says auto."""

    recipe: Recipe
    inputs: RunInputs
    way: Way
    ranks: int
    trained: int
    """Elements that are learnt."""
    memory: RankMemory
    """Of a rank."""
    activations: int
    """Bytes that a forward on a rank keeps, at most."""
    found: Delivery | Checkpoint | None
    """A finished adapter of this recipe, a checkpoint to go on from, or None."""


def dry_run(recipe: Recipe, way: Way = "one", ranks: int = 1, cpu: bool = False) -> DryRun:
    """Read and check all that a run reads before it loads weights; nothing is written but the token cache.

    With `cpu` the run would use no GPU, though one may be here.
    UserError names every problem that can be found.
    """
    problems: list[str] = []

    def check(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            if str(error) not in problems:
                problems.append(str(error))

    device = check(choose_device, "cpu" if cpu else recipe.run.device) or torch.device("cpu")
    kind: Any = device.type
    precision = check(choose_precision, recipe.run.precision, kind == "cuda")
    check(require_trackers, recipe.run.track)
    check(quantized.require, recipe.quantize)
    check(check_writable, Path(recipe.run.out))
    if way == "zero3":
        check(refuse_for_zero3, recipe)
    inputs = check(read_inputs, recipe)
    found = check(left_by_earlier_run, inputs) if inputs is not None else None
    if inputs is None:  # which has told of the first fault that it met
        if not problems[-1].startswith("base "):  # a hub is not waited for twice
            check(_read_base, recipe.base)
        for sources in (recipe.data.train, *recipe.data.validation_sources().values()):
            for source in recipe.data.read_as(sources):
                check(_read_through, source, recipe.data.split_on)
    if problems:
        raise UserError("; ".join(problems))
    return _foreseen(inputs, found, way, ranks, precision, kind)


def _foreseen(
    inputs: RunInputs, found: Delivery | Checkpoint | None, way: Way, ranks: int, precision: Format, device: Device
) -> DryRun:
    """What follows from what was read: the micro-batch, the recipe with numbers, the memory of a rank."""
    recipe, config, train = inputs.recipe, inputs.base.config, inputs.corpus.train
    block, per_rank = train.packing.block_size, -(-min(recipe.batch.global_size, len(train)) // ranks)
    micro = recipe.batch.micro_size
    if micro == "auto" and isinstance(found, Checkpoint) and found.state.micro_size:
        micro = found.state.micro_size
    elif micro == "auto":
        micro = first_micro_size(inputs, DTYPES[precision], way, ranks, device)
    shapes = shapes_of(config, recipe.lora)
    resolved = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"block_size": block}),
            "batch": recipe.batch.model_copy(update={"micro_size": micro}),
            "run": recipe.run.model_copy(update={"precision": precision}),
        }
    )
    rows = len(recipe.data.new_tokens) * config.n_embd
    memory = bytes_per_rank(shapes, way, ranks, precision, recipe.quantize)
    first, each = activations(config, recipe, DTYPES[precision], block, device, way == "zero3")
    kept = first + (min(micro, per_rank) - 1) * each
    return DryRun(resolved, inputs, way, ranks, shapes.adapter + rows, memory, kept, found)


def _read_base(name: str) -> None:
    base = open_base(name)
    assert base.tokenizer and base.weights


def _read_through(source: Source, split_on: str) -> None:
    for _ in read_documents(source, split_on):
        pass
