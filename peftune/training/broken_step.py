"""What made the loss or the gradient of a step infinite or no number: some text, the rate, or the base."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator

from peftune.data.batches import blocks_of_step, share_of
from peftune.training.checkpoint import State
from peftune.training.distributed.collectives import all_gather, lockstep_batches
from peftune.training.distributed.signals import StopRequest
from peftune.training.inputs import RunInputs
from peftune.training.optimizer import Gradient
from peftune.training.step import ForwardFn, draw_seed

_HIGH = 1e-3  # for LoRA
_AT_FAULT = 3  # documents named


def what_broke(
    inputs: RunInputs, state: State, forward: ForwardFn, gradient: Gradient, accelerator: Accelerator
) -> tuple[str, bool]:
    """Why the step after `state` is not finite, for people, and whether the state is good: only some text breaks it.

    Each block of the step is computed alone, then each document of those that are not finite.
    """
    train, recipe, rank = inputs.corpus.train, inputs.recipe, accelerator.process_index
    step = blocks_of_step(state.step, len(train), recipe.batch.global_size, recipe.run.seed)
    mine = share_of(step, state.micro_size, rank, accelerator.num_processes)

    def broken(rows: Sequence[range]) -> list[bool]:
        torch.manual_seed(draw_seed(recipe.run.seed, state.step, rank))
        found = []
        batches = (train.batch([row]) for row in rows)
        for batch in lockstep_batches(accelerator, forward.is_collective, batches, StopRequest()):
            gradient.flat.zero_()
            loss = forward(batch)
            gradient.add(loss)
            found.append(not math.isfinite(float(loss.detach())) or not math.isfinite(float(gradient.largest())))
        return found[: len(rows)]

    blocks = [train.packing.spans(int(block)) for block in mine]
    at_fault = [spans for spans, is_broken in zip(blocks, broken(blocks), strict=True) if is_broken]
    rows = [range(span, span + 1) for spans in at_fault[:_AT_FAULT] for span in spans]
    bad = [row.start for row, is_broken in zip(rows, broken(rows), strict=True) if is_broken]
    numbers = {int(train.documents[train.packing.example[span]]) for span in bad}
    here = ((len(blocks), len(at_fault), len(rows), len(bad)), list(inputs.corpus.places(numbers).values()))
    counts, found = zip(*all_gather(accelerator, here), strict=True)
    places = [place for of_rank in found for place in of_rank]
    return _blame(np.sum(counts, axis=0).tolist(), places, inputs, state, forward)


def _blame(
    counts: list[int], places: list[str], inputs: RunInputs, state: State, forward: ForwardFn
) -> tuple[str, bool]:
    """`counts` of blocks, of those that break, of documents tried in them, and of those that break; their `places`."""
    tried, failing, documents, broken = counts
    where, optim = ", ".join(places[:_AT_FAULT]), inputs.recipe.optim
    if not broken:
        return "it does not come back when each block is computed alone: start again from the last checkpoint", True
    if failing < tried or broken < documents:
        which = "these documents are" if broken > 1 else "this document is"
        more = " and more" if max(broken, failing) > _AT_FAULT else ""
        fp32 = "" if forward.dtype == torch.float32 else ", or take run.precision=fp32"
        return f"{which} to blame: {where}{more}; look at that text and remove it{fp32}, with another run.out", True
    if state.step == 0:
        return (
            f"every document is affected (first {where}) and the adapter changes nothing yet: the base itself is at "
            "fault, or run.precision is too coarse for it",
            False,
        )
    clip = ", or set optim.clip" if optim.clip is None else ""
    return (
        f"every document of the step is affected (first {where}), so the adapter is at fault: optim.lr={optim.lr:g} is "
        f"too high; try {min(optim.lr / 10, _HIGH):.2g}{clip}, with another run.out",
        False,
    )
