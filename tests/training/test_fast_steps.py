"""A whole run by fast steps ends where one by Transformers' and PEFT's steps ends, whatever the recipe asks for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftune.config.recipe import Recipe
from peftune.errors import Interrupted
from peftune.training import run, step
from peftune.training.metrics import read_metrics
from peftune.training.run import train

Make = Callable[..., Recipe]
Distance = Callable[[Path, Path], float]


def events(out: Path, kind: str) -> list[dict[str, float]]:
    return [event for event in read_metrics(out / "metrics.jsonl") if event["event"] == kind]


@pytest.mark.parametrize(
    "asked",
    [
        ("optim.label_smoothing=0.1", "lora.variant=rslora"),
        ("data.packing=false", "run.checkpointing=true", "batch.micro_size=3"),
        ("lora.targets=[c_attn, mlp.c_proj]", "lora.layers=[1]", "optim.lr_b_ratio=4"),
        ("lora.variant=pissa",),
        ("quantize=int8",),
        ("quantize=nf4", "lora.variant=loftq"),
    ],
)
def test_it_ends_in_the_same_place(recipe: Make, tmp_path: Path, distance: Distance, asked: tuple[str, ...]) -> None:
    """Losses to 1e-6; adapters after eight AdamW steps to 1e-5 over all elements, as rounding differs."""
    if "quantize" in asked[0]:
        pytest.importorskip("bitsandbytes")
    common = "data.validation=0.2", "run.eval_every=4", "optim.steps=8", *asked
    for name in ("true", "false"):
        train(recipe(*common, f"run.fast={name}", f"run.out={tmp_path / name}"))
    for kind in ("train", "eval"):
        found, wanted = ([e["loss"] for e in events(tmp_path / name, kind)] for name in ("true", "false"))
        np.testing.assert_allclose(found, wanted, rtol=2e-6)
    assert distance(tmp_path / "true", tmp_path / "false") < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="compiling needs a C++ compiler")
def test_compiled_it_ends_in_the_same_place(
    recipe: Make,
    tmp_path: Path,
    distance: Distance,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("peftune.training.loading._WORTH_COMPILING", {"cpu": 0.0})
    common = "data.validation=0.2", "run.eval_every=4", "optim.steps=8", "lora.layers=[1]"
    for name in ("true", "false"):
        train(recipe(*common, f"run.compile={name}", f"run.out={tmp_path / name}"))
    (start,) = events(tmp_path / "true", "start")
    stated = ("elementwise operations compiled in", "not compiled: what the compiler made is off by")  # on such a CPU
    assert any(words in str(start["function"]) for words in stated), start["function"]
    assert distance(tmp_path / "true", tmp_path / "false") < 1e-5
    assert "compiling elementwise operations" in capsys.readouterr().err


def test_a_run_may_change_its_function_where_it_was_cut(
    recipe: Make, tmp_path: Path, distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe("optim.steps=6", f"run.out={whole}"))

    def stop_after_three(learner: step.Learner, *others: Any) -> step.StepResult:
        if learner.state.step == 3:
            raise step.StopNow
        return step.train_step(learner, *others)

    with monkeypatch.context() as patched:
        patched.setattr(run, "train_step", stop_after_three)
        with pytest.raises(Interrupted):
            train(recipe("optim.steps=6", f"run.out={cut}"))
    train(recipe("optim.steps=6", f"run.out={cut}", "run.fast=false"))
    assert distance(whole, cut) < 1e-5


@pytest.mark.parametrize(
    ("asked", "description"),
    [
        ((), "fast steps (batched products by query blocks)"),
        (
            ("run.compile=true",),
            "fast steps (batched products by query blocks, not compiled: the run is too short to repay it)",
        ),
        (("run.fast=false",), "steps by Transformers and PEFT (run.fast is false)"),
        (("lora.variant=dora",), "steps by Transformers and PEFT (DoRA normalises full weights)"),
        (("run.base_dropout=0.1",), "0.1, attn_pdrop 0.1, resid_pdrop 0.1)"),
    ],
)
def test_a_run_says_which_function_computes_it_and_why(recipe: Make, asked: tuple[str, ...], description: str) -> None:
    made = recipe("optim.steps=1", *asked)
    train(made)
    (start,) = events(Path(made.run.out), "start")
    assert str(start["function"]).endswith(description)


def test_the_smoothed_loss_is_learnt_from_and_evaluation_is_not_smoothed(recipe: Make, tmp_path: Path) -> None:
    plain = train(recipe("data.validation=0.2", f"run.out={tmp_path / 'a'}"))
    smoothed = train(recipe("data.validation=0.2", "optim.label_smoothing=0.3", f"run.out={tmp_path / 'b'}"))
    assert plain.metrics["validation"]["base"] == smoothed.metrics["validation"]["base"]
    first, first_smoothed = (events(tmp_path / name, "train")[0]["loss"] for name in ("a", "b"))
    assert first_smoothed != first
