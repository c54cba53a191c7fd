"""How many of the package's files a reader must open to follow a training run: those whose functions it enters."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import peftune
from peftune.config.recipe import Recipe
from peftune.training import run, step

Make = Callable[..., Recipe]

PACKAGE = Path(peftune.__file__).parent


@contextmanager
def entered_files(found: set[str]) -> Iterator[None]:
    """Collect the files under `peftune/` whose functions are called meanwhile, on any thread started meanwhile."""

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents:
                found.add(str(path.relative_to(PACKAGE)))

    before = sys.getprofile()
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def test_a_step_on_the_fast_path_enters_at_most_twelve_files(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()

    def observed(*given: Any) -> step.StepResult:
        with entered_files(found):
            return step.train_step(*given)

    monkeypatch.setattr(run, "train_step", observed)
    run.train(recipe("batch.micro_size=2", "lora.dropout=0.1"))
    assert "model/train/forward.py" in found and "training/optimizer.py" in found
    assert len(found) <= 12, "\n".join(sorted(found))


def test_a_small_run_with_validation_enters_at_most_sixty_files(recipe: Make, tmp_path: Path) -> None:
    """Plain text, tokenised by the run before, as everywhere but in the first run; JSON lines take three more.

    Of these 12 read sources and look for what spoils them, 4 foresee memory, and 2 watch over the run.
    """
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on mat {number} and one dog ran to my log" for number in range(60)))
    settings = f"data.train={text}", "data.validation=0.2", "run.eval_every=2", "run.save_every=2"
    run.train(recipe(*settings, f"run.out={tmp_path / 'first'}"))
    again, found = recipe(*settings, f"run.out={tmp_path / 'second'}"), set[str]()
    with entered_files(found):
        run.train(again)
    assert "training/run.py" in found and "training/export/adapter.py" in found
    assert not any(path.startswith("model/train/cross_entropy") for path in found)  # that of GPUs
    assert len(found) <= 60, "\n".join(sorted(found))
