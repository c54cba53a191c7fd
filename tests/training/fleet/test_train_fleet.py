"""Adapters that learn side by side are those that they would have become alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from peftune.config.recipe import Recipe
from peftune.data.batches import Batch
from peftune.errors import CheckFailed, Interrupted, UserError
from peftune.model.train import forward
from peftune.model.train.forward import TrainGPT2
from peftune.model.train.grouped_lora import batched, grouped
from peftune.training import loading, run
from peftune.training.checkpoint import State
from peftune.training.distributed.signals import StopNow
from peftune.training.export.adapter import Delivery
from peftune.training.fleet import train_fleet as train_fleet_module
from peftune.training.fleet.shared_room import side_by_side
from peftune.training.fleet.train_fleet import train_fleet
from peftune.training.health import validation_loss
from peftune.training.metrics import MetricsLog, read_metrics
from peftune.training.planning.memory_model import shapes_of
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


def solo_and_fleet(recipe: Make, folder: Path, members: dict[str, list[str]], *extra: str) -> list[Recipe]:
    """Train each alone; the recipes of the same fleet."""
    for name, overrides in members.items():
        train(recipe(*overrides, *extra, f"run.out={folder / 'alone' / name}"))
    return [recipe(*overrides, *extra, f"run.out={folder / 'fleet' / name}") for name, overrides in members.items()]


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_base_is_held_once_and_serves_all(
    recipe: Make, tmp_path: Path, distance: Distance, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {"a": [], "b": ["lora.rank=2", "lora.variant=loftq"], "c": ["lora.variant=rslora"]}
    fleet = solo_and_fleet(recipe, tmp_path, members, f"quantize={quantize}")
    models: list[Any] = []
    adapt = loading.load_adapted
    monkeypatch.setattr(loading, "load_adapted", lambda *given: models.append(adapt(*given)) or models[-1])
    train_fleet(fleet)
    weights = [m.model.get_base_model().transformer.h[0].mlp.c_fc.base_layer.weight.data_ptr() for m in models]
    assert len({*weights}) == 1 and len(weights) == 3
    for name in members:
        assert distance(tmp_path / "alone" / name, tmp_path / "fleet" / name) < 1e-6, name


def test_lower_layers_are_computed_once_of_equal_tokens(
    recipe: Make, tmp_path: Path, distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {"a": ["optim.lr=1e-3"], "b": ["optim.lr=3e-3"], "c": ["run.seed=1"]}
    fleet = solo_and_fleet(recipe, tmp_path, members, "lora.layers=[1]")
    seen: list[int] = []
    below = TrainGPT2.below
    monkeypatch.setattr(
        TrainGPT2, "below", lambda self, tokens, depth: seen.append(len(tokens)) or below(self, tokens, depth)
    )
    train_fleet(fleet)
    assert seen == [2] * 3  # of three adapters two read the same blocks in the same order
    for name in members:
        assert distance(tmp_path / "alone" / name, tmp_path / "fleet" / name) < 1e-6, name


def test_members_that_cannot_share_forwards_run_after_the_others(
    recipe: Make, tmp_path: Path, distance: Distance, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {
        "a": [], "slow": ["run.fast=false"], "b": ["run.seed=1"], "dora": ["lora.variant=dora"],
        "short": ["data.block_size=32"],
    }  # fmt: skip
    fleet = solo_and_fleet(recipe, tmp_path, members)
    capsys.readouterr()
    outcomes = train_fleet(fleet)
    told = capsys.readouterr().err
    assert "a, b\n" in told and "slow alone: run.fast is false" in told and "dora alone: it trains more" in told
    assert [outcome.out for outcome in outcomes if isinstance(outcome, Delivery)] == [Path(r.run.out) for r in fleet]
    for name in members:
        assert distance(tmp_path / "alone" / name, tmp_path / "fleet" / name) < 1e-6, name


@pytest.mark.parametrize(("room", "told"), [(-1.0, "c alone: memory"), (2.5, "a, b: memory holds no more adapters")])
def test_as_many_as_memory_holds_learn_at_a_time(
    recipe: Make, tmp_path: Path, distance: Distance, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], room: float, told: str,
) -> None:  # fmt: skip
    """Beside base and forward there is room for no adapter, or for two and a half."""
    members = {"a": ["run.seed=1"], "b": ["run.seed=2"], "c": ["run.seed=3"]}
    fleet = solo_and_fleet(recipe, tmp_path, members)
    one = 16 * shapes_of(GPT2Config.from_pretrained(fleet[0].base), fleet[0].lora).adapter
    monkeypatch.setattr(train_fleet_module, "grown_at_most", lambda *_: 1_000_000)
    monkeypatch.setattr(train_fleet_module, "usable_memory", lambda _: 1_000_000 + int(room * one))
    capsys.readouterr()
    train_fleet(fleet)
    assert told in capsys.readouterr().err
    for name in members:
        assert distance(tmp_path / "alone" / name, tmp_path / "fleet" / name) < 1e-6, name


def test_one_that_breaks_leaves_and_the_others_do_not_notice(
    recipe: Make, tmp_path: Path, distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is no number, a rate that diverges, a disk that is full, data that is not there."""
    members = {"a": ["optim.steps=6"], "b": ["lora.rank=2", "optim.steps=6"]}
    good = solo_and_fleet(recipe, tmp_path, members)
    bad = {
        "nan": ["optim.steps=6", "run.seed=7"], "diverges": ["optim.lr=1e9", "optim.clip=null", "optim.steps=6"],
        "full": ["optim.steps=6", "run.seed=9"], "absent": ["data.train=/no/such/file.txt"],
    }  # fmt: skip
    made = {name: recipe(*overrides, f"run.out={tmp_path / 'fleet' / name}") for name, overrides in bad.items()}
    adapt, write = loading.load_adapted, MetricsLog._append

    def poisoned(made: Recipe, *given: Any) -> Any:
        adapted = adapt(made, *given)
        if made.run.seed == 7:  # its losses and gradients, and every value that they touch
            next(p for name, p in adapted.trainable().items() if ".lora_B." in name).data.fill_(math.nan)
        return adapted

    def full(log: MetricsLog, line: bytes) -> None:
        if log.path.parent.name == "full" and b'"step": 3' in line:
            log.close()
            log.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        write(log, line)

    monkeypatch.setattr(MetricsLog, "_append", full)
    monkeypatch.setattr(loading, "load_adapted", poisoned)
    recipes = [good[0], *made.values(), good[1]]
    first, nan, diverges, disk, absent, last = train_fleet(recipes)
    assert isinstance(first, Delivery) and isinstance(last, Delivery)
    assert isinstance(nan, CheckFailed) and "step 1: loss nan" in str(nan)
    assert isinstance(diverges, CheckFailed)
    assert isinstance(disk, UserError) and "metrics.jsonl: cannot be written: No space left" in str(disk)
    assert isinstance(absent, UserError) and "/no/such/file.txt" in str(absent)
    for name, error in (("nan", nan), ("diverges", diverges)):
        last_event = read_metrics(tmp_path / "fleet" / name)[-1]
        assert (last_event["event"], last_event["text"]) == ("failed", str(error))
    for name in members:
        assert distance(tmp_path / "alone" / name, tmp_path / "fleet" / name) < 1e-6, name


def cut_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """As if a signal came in the step after so many."""
    taken = iter([train_fleet_module.steps_together] * steps)

    patch.setattr(train_fleet_module, "steps_together", lambda *given: next(taken, _stop)(*given))


def test_a_solo_run_goes_on_from_a_fleet_and_a_fleet_from_a_solo_run(
    recipe: Make, tmp_path: Path, distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {
        "a": ["optim.steps=7", "lora.dropout=0.1"], "b": ["lora.rank=2", "optim.steps=4", "data.validation=0.2"],
        "c": ["optim.steps=6", "run.seed=2"],
    }  # fmt: skip
    a, b, c = solo_and_fleet(recipe, tmp_path, members)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"checkpoints of 3 adapters saved \(a at st"):
        cut_after(2, patch)
        train_fleet([a, b, c])
    train(a)
    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=r"2 adapters saved \(c at step 5, b at step 3"),
    ):
        cut_after(1, patch)
        with monkeypatch.context() as other, pytest.raises(Interrupted):
            taken = iter([run.train_step] * 2)
            other.setattr(run, "train_step", lambda *given: next(taken, _stop)(*given))
            train(c)
        train_fleet([a, c, b])
    outcomes = train_fleet([c, b, a])
    assert all(isinstance(outcome, Delivery) for outcome in outcomes)
    for name in members:
        solo, ours = (tmp_path / kind / name for kind in ("alone", "fleet"))
        assert distance(solo, ours) < 1e-6, name
        assert losses(ours) == pytest.approx(losses(solo), rel=1e-6)


def _stop(*_: Any) -> Any:
    raise StopNow


def test_members_stop_at_a_share_of_their_steps_and_go_on(recipe: Make, tmp_path: Path, distance: Distance) -> None:
    settings = ["data.validation=0.2", "run.eval_every=2"]
    members = {"a": ["optim.steps=8", *settings], "b": ["optim.steps=4", "lora.rank=2", *settings]}
    fleet = solo_and_fleet(recipe, tmp_path, members)
    for _ in range(2):  # the second time there is nothing to do
        paused = [state for state in train_fleet(fleet, until=0.5) if isinstance(state, State)]
        assert [(state.step, validation_loss(state, state.step) is not None) for state in paused] == [
            (4, True),
            (2, True),
        ]
    train_fleet(fleet)
    for name in members:
        assert distance(tmp_path / "alone" / name, tmp_path / "fleet" / name) < 1e-6, name


def test_early_stopping_ends_one_and_the_others_go_on(recipe: Make, tmp_path: Path, distance: Distance) -> None:
    stops = ["optim.lr=1.0", "optim.steps=12", "data.validation=0.3", "run.eval_every=1", "run.early_stopping=2"]
    members = {"stops": [*stops, "optim.warmup=4"], "goes on": ["optim.steps=12"]}
    fleet = solo_and_fleet(recipe, tmp_path, members)
    train_fleet(fleet)
    steps = {name: json.loads((tmp_path / "fleet" / name / "peftune.json").read_text())["step"] for name in members}
    assert steps["goes on"] == 12 > steps["stops"] > 0
    for name in members:
        assert distance(tmp_path / "alone" / name, tmp_path / "fleet" / name) < 1e-6, name


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["run.out=x"], ["run.out=./x"], "run.out ./x is also that of x"),
        (["run.out=x"], ["run.out=y", "run.device=cpu"], "run.device is cpu, x has auto"),
        (["run.out=x"], ["run.out=y", "run.track=[tensorboard]"], "run.track: trackers log one run at a time"),
    ],
)
def test_what_one_process_cannot_do_is_refused(recipe: Make, first: list[str], second: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        train_fleet([recipe(*first), recipe(*second)])
    with pytest.raises(UserError, match="expected a list"):
        train_fleet("recipe.yaml")  # type: ignore[arg-type]


@pytest.mark.parametrize("products", [grouped, batched])
def test_with_products_of_all_adapters_at_once_each_equals_its_solo_run(
    recipe: Make, tmp_path: Path, distance: Distance, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where these are taken."""
    fleet = solo_and_fleet(recipe, tmp_path, UNEQUAL, "run.checkpointing=true")
    monkeypatch.setattr(forward, "products_for", lambda sizes, dtype, device: products(sizes, device))
    train_fleet(fleet)
    for name in UNEQUAL:
        assert distance(tmp_path / "alone" / name, tmp_path / "fleet" / name) < 1e-6, name


def test_the_base_is_scored_once_for_all_that_read_the_same(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {"a": ["lora.rank=2"], "b": ["optim.lr=1e-3"], "c": ["data.validation=0.3"]}
    fleet = solo_and_fleet(recipe, tmp_path, {n: ["data.validation=0.2", *o] for n, o in members.items()})
    evaluate, seen = run.evaluate_domain, []

    def note(name: str, *given: Any) -> Any:
        seen.append(name)
        return evaluate(name, *given)

    monkeypatch.setattr(run, "evaluate_domain", note)
    train_fleet(fleet)
    assert len(seen) == 2 + 3  # before the first step of two splits, after the last of each adapter
    for name in members:
        assert losses(tmp_path / "fleet" / name) == pytest.approx(losses(tmp_path / "alone" / name), rel=1e-6)


def test_micro_batches_are_put_together_in_turns_until_there_is_no_room() -> None:
    def batches(number: int, *tokens: int) -> Iterator[Batch]:
        for count in tokens:
            ids = torch.full((1, count), number)
            yield Batch(ids, ids, ids, None)

    def grouped_by(positions: int, most: int) -> list[list[tuple[int, int]]]:
        queues = [batches(0, 5, 5), batches(1, 3), batches(2, 9, 2, 2)]
        return [[(n, b.ids.numel()) for n, b in group] for group in side_by_side(queues, positions, most)]

    assert grouped_by(100, 9) == [[(0, 5), (1, 3), (2, 9)], [(0, 5), (2, 2)], [(2, 2)]]
    assert grouped_by(8, 9) == [[(0, 5), (1, 3)], [(2, 9)], [(0, 5), (2, 2)], [(2, 2)]]
    assert grouped_by(100, 2) == [[(0, 5), (1, 3)], [(2, 9), (0, 5)], [(2, 2)], [(2, 2)]]
    assert grouped_by(1, 9) == [[(0, 5)], [(1, 3)], [(2, 9)], [(0, 5)], [(2, 2)], [(2, 2)]]
