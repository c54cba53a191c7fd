"""Adapters that learn side by side are those that they would have become alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftune.config.recipe import Recipe
from peftune.training.export.adapter import Delivery
from peftune.training.fleet.train_fleet import train_fleet
from peftune.training.metrics import read_metrics
from peftune.training.run import train

Make = Callable[..., Recipe]
Distance = Callable[[Path, Path], float]

UNEQUAL = {
    "a": ["optim.steps=6", "data.validation=0.2", "run.eval_every=2"],
    "b": ["lora.rank=2", "lora.targets=attention", "optim.steps=4", "batch.global_size=5", "batch.micro_size=2"],
    "c": ["lora.targets=['mlp.c_fc']", "run.seed=3", "lora.dropout=0.2", "batch.micro_size=3", "optim.steps=5"],
    "d": ["lora.targets=query-value", "optim.neftune=5", "optim.label_smoothing=0.1", "optim.steps=5"],
}


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(out) if event["event"] in ("train", "eval")]


@pytest.mark.parametrize("extra", [[], ["run.checkpointing=true"]], ids=["plain", "recomputed"])
def test_each_of_unequal_adapters_equals_its_solo_run(
    recipe: Make, tmp_path: Path, distance: Distance, extra: list[str]
) -> None:
    alone = {n: recipe(*o, *extra, f"run.out={tmp_path / 'alone' / n}") for n, o in UNEQUAL.items()}
    fleet = {n: recipe(*o, *extra, f"run.out={tmp_path / 'fleet' / n}") for n, o in UNEQUAL.items()}
    for made in alone.values():
        train(made)
    outcomes = train_fleet([*fleet.values()])
    assert all(isinstance(outcome, Delivery) for outcome in outcomes)
    for name in UNEQUAL:
        solo, ours = (tmp_path / kind / name for kind in ("alone", "fleet"))
        assert distance(solo, ours) < 1e-6, name
        assert losses(ours) == pytest.approx(losses(solo), rel=1e-6)
        assert {path.name for path in ours.iterdir()} == {path.name for path in solo.iterdir()}
