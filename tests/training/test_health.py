"""What goes wrong in a run is told while it goes on; each sign is proven by a fault that is planted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from peftune.config.recipe import Recipe
from peftune.data.batches import Batch
from peftune.errors import CheckFailed
from peftune.inference.perplexity import Score
from peftune.training import checkpoint, loading, run, step
from peftune.training.inputs import read_inputs
from peftune.training.metrics import read_metrics
from peftune.training.optimizer import Gradient
from peftune.training.run import train
from peftune.training.step import ForwardFn, Learner, StepResult

Make = Callable[..., Recipe]


def warnings_of(made: Recipe) -> list[str]:
    events = read_metrics(Path(made.run.out) / "metrics.jsonl")
    return [event["text"] for event in events if event["event"] == "warning"]


def pretend(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Steps after the third do nothing and report these losses."""
    left = iter(losses)

    def taken(learner: Learner, *rest: Any) -> StepResult:
        if learner.state.step < 3:
            return step.train_step(learner, *rest)
        return StepResult(next(left), 1.0, 1e-3, 100)

    monkeypatch.setattr(run, "train_step", taken)


def not_finite(monkeypatch: pytest.MonkeyPatch, applies: Callable[[Batch], bool]) -> None:
    """The loss of such batches is no number."""
    score = ForwardFn.__call__

    def broken(forward: ForwardFn, batch: Batch) -> torch.Tensor:
        return score(forward, batch) * (math.nan if applies(batch) else 1.0)

    monkeypatch.setattr(ForwardFn, "__call__", broken)


def test_nothing_is_told_of_a_run_that_goes_well(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe("data.validation=0.2", "optim.steps=40", "run.eval_every=10", "optim.lr=3e-3")
    train(made)
    assert warnings_of(made) == [] and "warning" not in capsys.readouterr().err


def test_a_base_that_changes_in_training_is_found_by_the_third_step(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loading.load_adapted
    models: list[Any] = []
    monkeypatch.setattr(loading, "load_adapted", lambda *given: models.append(loaded(*given)) or models[-1])

    def damaging(learner: Learner, *rest: Any) -> StepResult:
        done = step.train_step(learner, *rest)
        if learner.state.step == 1:
            weight = models[0].model.get_base_model().transformer.h[1].mlp.c_fc.base_layer.weight
            weight.data[3, 5] += 1e-6
        return done

    monkeypatch.setattr(run, "train_step", damaging)
    made = recipe("optim.steps=9")
    with pytest.raises(CheckFailed, match=r"step 3: transformer\.h\.1\.mlp\.c_fc\.base_layer\.weight of the base has"):
        train(made)
    assert not (Path(made.run.out) / "adapter_config.json").exists()


def test_a_matrix_that_no_gradient_reaches_is_found_by_the_third_step(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Gradient.add

    def cut(gradient: Gradient, loss: torch.Tensor) -> None:
        add(gradient, loss)
        gradient.views[3].zero_()

    monkeypatch.setattr(Gradient, "add", cut)
    with pytest.raises(CheckFailed, match=r"step 3: \S+attn\.c_proj\.lora_B\S+ of the adapter is still zero"):
        train(recipe("optim.steps=9"))


def test_a_rate_that_rounding_loses_is_told(recipe: Make) -> None:
    made = recipe("optim.lr=1e-12")
    train(made)
    (told,) = warnings_of(made)
    assert "lora_A.default.weight (and 7 more) has not changed: the rate, 1e-12 so far, is so low" in told


def test_documents_that_break_the_loss_are_named_and_the_state_before_is_saved(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    lines = [f"the cat sat on mat {number} and one dog ran to my log" for number in range(40)]
    lines[17] += "~"
    texts.write_text("\n\n".join(lines))
    trained: list[int] = []
    not_finite(monkeypatch, lambda batch: len(trained) == 2 and bool((batch.ids == rare).any()))

    def counting(*given: Any) -> StepResult:
        done = step.train_step(*given)
        trained.append(1)
        return done

    monkeypatch.setattr(run, "train_step", counting)
    made = recipe(f"data.train={texts}", "batch.global_size=64", "batch.micro_size=auto", "optim.steps=9")
    tokenizer = read_inputs(made).tokenizer
    (rare,) = tokenizer.encode("~")
    with pytest.raises(CheckFailed) as error:
        train(made)
    found = str(error.value)
    assert found.startswith("step 3: loss nan") and f"this document is to blame: {texts}:35; look" in found
    assert f"the last good state: {made.run.out}/checkpoints/step-2" in found
    assert checkpoint.read(Path(made.run.out) / "checkpoints" / "step-2").state.step == 2
    assert read_metrics(made.run.out)[-1] == {"event": "failed", "step": 2, "text": found}
    monkeypatch.undo()
    train(made)
    assert "failed" not in {event["event"] for event in read_metrics(made.run.out)}


def test_a_document_at_fault_is_named_as_training_cut_and_skipped_the_text(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Several text files, each one document; rows of a table that are skipped."""
    stories = [tmp_path / f"{number}.txt" for number in range(4)]
    for number, path in enumerate(stories):
        path.write_text(f"the cat sat on mat {number}\n\none dog ran to my log{'~' * (number == 2)}\n\nand sat")
    rows = [{"text": "a dog"}, {"text": None}, {"text": "the log"}, {"text": "a mat~"}, {"text": "my cat"}]
    (table := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (rare,) = read_inputs(recipe()).tokenizer.encode("~")
    not_finite(monkeypatch, lambda batch: bool((batch.ids == rare).any()))
    several = ", ".join(map(str, stories))
    for source, place in ((f"[{several}]", f"{stories[2]}:1"), (str(table), f"{table}:4")):
        made = recipe(f"data.train={source}", "data.on_bad_row=skip", f"run.out={tmp_path / 'out' / place[-3:]}")
        with pytest.raises(CheckFailed, match=f"this document is to blame: {re.escape(place)}; look"):
            train(made)


@pytest.mark.parametrize(
    ("good", "overrides", "blamed"),
    [
        (0, [], "the base itself is at fault"),
        (2, [], "optim.lr=0.01 is too high; try 0.001, with another run.out"),
        (2, ["optim.lr=0.05", "optim.clip=null"], r"optim.lr=0.05 is too high; try 0.001, or set optim.clip, with"),
    ],
)
def test_where_every_document_breaks_the_loss_base_or_rate_is_blamed(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, good: int, overrides: list[str], blamed: str
) -> None:
    taken: list[int] = []

    def counting(*given: Any) -> StepResult:
        done = step.train_step(*given)
        taken.append(1)
        return done

    monkeypatch.setattr(run, "train_step", counting)
    not_finite(monkeypatch, lambda batch: len(taken) == good)
    made = recipe("optim.steps=9", "run.save_every=1", *overrides)
    with pytest.raises(CheckFailed, match=blamed) as error:
        train(made)
    last = f"{made.run.out}/checkpoints/step-{good}" if good else "none was saved"
    assert f"the last good state: {last}" in str(error.value)


def test_a_rate_that_saturates_the_model_is_blamed(recipe: Make) -> None:
    with pytest.raises(CheckFailed, match=r"step 2: no gradient .* as where optim.lr is too high"):
        train(recipe("optim.lr=1e9"))


def test_a_spike_is_told_and_noise_is_not(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [3.0 + 0.1 * math.sin(7 * number) for number in range(60)]
    noise[40] = 5.5
    pretend(monkeypatch, noise)
    made = recipe("optim.steps=60")
    train(made)
    spikes = [text for text in warnings_of(made) if "spike" in text]
    assert len(spikes) == 1 and spikes[0].startswith("step 44: a spike, loss 5.500 where the 20 steps before had 3.0")


def test_a_loss_that_rises_is_a_rate_too_high(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [6.0 + number / 10 for number in range(20)])
    made = recipe("optim.steps=16")
    train(made)
    (told,) = warnings_of(made)
    assert "after 16 steps, higher than" in told and "optim.lr=0.01 is too high; try 0.002" in told


@pytest.mark.parametrize(
    ("losses", "told", "at_the_end"),
    [
        ([5, 5.2, 5.4, 5.5, 5.6], "only risen since step 0 (5.0000 → 5.4000): optim.lr=0.01 is too high (try 0.002)",
         "the adapter of step 4 is worse on the validation text than the base (5.0000 → 5.6000"),
        ([5, 4, 4.2, 4.3, 4.4], "since step 1 was better than its validation loss of 4.0000, and it is 4.4000 now",
         "step 1 was better on the validation text (4.0000 nats per token, step 4 has 4.4000); run.early_stopping"),
    ],
)  # fmt: skip
def test_a_validation_that_only_rises_or_turns_is_told(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, losses: Sequence[float], told: str, at_the_end: str
) -> None:
    left = iter(losses)
    monkeypatch.setattr(run, "evaluate_domain", lambda *_: Score(100 * next(left), 100, 400))
    made = recipe("data.validation=0.2", "optim.steps=4", "run.eval_every=1")
    train(made)
    during, end = warnings_of(made)
    assert told in during and end.startswith(at_the_end)


def test_a_rate_that_changes_nothing_is_told(recipe: Make, tmp_path: Path) -> None:
    made = recipe("data.validation=0.2", "optim.lr=1e-7", "optim.steps=20")
    train(made)
    assert any("optim.lr=1e-07 is too low, unless the base knew this text; try 1e-06" in t for t in warnings_of(made))
    made = recipe("optim.lr=1e-7", "optim.steps=40", f"run.out={tmp_path / 'unvalidated'}")
    train(made)
    assert "the training loss has not changed beyond its noise" in warnings_of(made)[-1]
