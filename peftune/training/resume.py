"""What an earlier run left in `run.out`, and whether this one may go on from it."""

from __future__ import annotations

from pathlib import Path

from peftune.console import Console
from peftune.errors import UserError
from peftune.training import checkpoint
from peftune.training.checkpoint import Checkpoint
from peftune.training.export.adapter import Delivery, already_delivered
from peftune.training.identity import refuse_other_run
from peftune.training.inputs import RunInputs


def earlier_run(inputs: RunInputs, console: Console) -> Delivery | Checkpoint | None:
    """What an earlier run of this recipe left: a finished adapter, a checkpoint to go on from, or nothing.

    Damaged checkpoints are named and set aside. UserError, and nothing is changed, where a run of another recipe is
    there, and where there are checkpoints but none that can be read.
    """
    out = Path(inputs.recipe.run.out)
    done = already_delivered(out, inputs.identity)
    if done is not None:
        return done
    found = checkpoint.newest(out / "checkpoints")
    if found is not None:
        if inputs.recipe.run.resume == "never":
            raise UserError(f"{out}/checkpoints: a run is there, and run.resume is never; use auto, or another run.out")
        refuse_other_run(found.state.identity, inputs.identity, str(out))
        if found.state.step > inputs.total_steps:
            raise UserError(f"{out}/checkpoints: has step {found.state.step} of a run of {inputs.total_steps} steps")
    elif (out / "metrics.jsonl").exists():
        console.say(f"{out}: an earlier run left no checkpoint; starting from step 0")
    checkpoint.tidy(out / "checkpoints", found, console.say)
    return found
