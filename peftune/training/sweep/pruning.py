"""Successive halving (1502.07943): every run learns for a while, the best go on, and again.

Of a factor F, a share 1 / F of the combinations is kept after 1 / F² and after 1 / F of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from peftune.errors import PeftuneError
from peftune.training.checkpoint import State
from peftune.training.fleet.members import Outcome
from peftune.training.health import mean_loss, validation_loss
from peftune.training.metrics import read_metrics


def rungs(factor: int) -> tuple[float, float]:
    """Shares of the steps after which is decided."""
    return 1 / factor**2, 1 / factor


def kept(losses: Mapping[str, Sequence[float | None]], factor: int) -> list[str]:
    """The combinations that go on, the best first; `losses` are those of the seeds, None where a run failed.

    A combination with a failed seed stands behind all that have none; where all seeds failed it does not go on.
    """

    def rank(name: str) -> tuple[bool, float]:
        known = [loss for loss in losses[name] if loss is not None]
        return len(known) < len(losses[name]), fmean(known)

    able = [name for name, of in losses.items() if any(loss is not None for loss in of)]
    return sorted(able, key=rank)[: math.ceil(len(losses) / factor)]


def loss_at(found: Outcome, out: Path, share: float) -> float | None:
    """Validation loss of a run at its first evaluation at or after a share of its steps; None for one that failed.

    A run that is finished already is judged by what it had reached then, else it would win against all others.
    """
    if isinstance(found, PeftuneError):
        return None
    if isinstance(found, State):
        return validation_loss(found, found.evaluated_step)
    events = read_metrics(out)
    total = next((event["total_steps"] for event in events if "total_steps" in event), 0)
    evaluated = [event for event in events if event["event"] == "eval" and event["step"] >= share * total]
    return mean_loss({event["domain"]: event for event in evaluated if event["step"] == evaluated[0]["step"]})
