"""A small corpus with documents of very unequal lengths, and recipes over it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftune.config.recipe import Recipe, recipe_from

WORDS = ["the", "cat", "sat", "on", "a", "mat", "one", "dog", "ran", "to", "my", "log", "café", "naïve", "straße"]


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 60 words; some are longer than a block of 64 tokens."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.choice([1, 2, 5, 9, 20, 60]))) for _ in range(count)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 documents as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(26)), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tiny_base: Path, corpus: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe("optim.lr=1e-3", …)`: a fast fp32 recipe on the tiny base with overrides."""

    def make(*overrides: str) -> Recipe:
        values: dict[str, Any] = {
            "base": str(tiny_base),
            "data": {"train": str(corpus), "validation": 0},
            "lora": {"rank": 4, "alpha": 8},
            "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0, "steps": 3},
            "batch": {"global_size": 8, "micro_size": 8},
            "run": {"out": str(tmp_path / "adapter"), "precision": "fp32", "eval_every": 0, "save_every": 0},
        }
        return recipe_from(values, list(overrides))

    return make


@pytest.fixture
def train_without_delivery(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], Path]:
    """Trains as if the process had been cut after its last checkpoint; returns the run's directory."""
    from peftune.errors import Interrupted
    from peftune.training import run

    def cut(_: object) -> None:
        raise Interrupted("cut before delivery")

    def train(made: Recipe) -> Path:
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="cut before delivery"):
            patch.setattr(run, "export", cut)
            run.train(made)
        return Path(made.run.out)

    return train
