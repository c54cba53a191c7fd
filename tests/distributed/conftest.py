"""Real ranks over gloo, started as a person starts them; a corpus on which unequal ranks would show."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TWO_RANKS = {"ddp": "cpu-2", "zero1": "cpu-2-zero1", "zero2": "cpu-2-zero2", "zero3": "cpu-2-zero3"}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "one", "dog", "ran", "to", "my", "log", "café", "naïve", "straße"]

Values = dict[str, Any]


def command(way: str | Path, *target: str) -> list[str]:
    """The launcher's command line for `one` process, for two ranks, or for a file of one's own."""
    if way == "one":
        return [sys.executable, *target]
    config = way if isinstance(way, Path) else ROOT / "accelerate_configs" / f"{TWO_RANKS[way]}.yaml"
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *target]


def environment(**more: str) -> dict[str, str]:
    """One thread a rank; the package of this checkout."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


@pytest.fixture(scope="session")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions of very unequal lengths; some prompts fill whole blocks, which then score nothing."""
    chance = random.Random(1)
    rows = [
        {
            "prompt": " ".join(chance.choices(WORDS, k=chance.choice([1, 3, 30, 130]))),
            "completion": " ".join(chance.choices(WORDS, k=chance.choice([1, 2, 9, 40]))),
        }
        for _ in range(40)
    ]
    path = tmp_path_factory.mktemp("unequal") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def values(tiny_base: Path, unequal: Path) -> Callable[..., Values]:
    """`values(out, section={key: value})`: a recipe of three epochs whose last step each has a single block."""

    def make(out: Path, **sections: Values | str) -> Values:
        made: Values = {
            "base": str(tiny_base),
            "data": {"train": str(unequal), "validation": 0.2},
            "lora": {"rank": 4, "alpha": 8},
            "optim": {"lr": 1e-2, "clip": 0.5, "weight_decay": 0.01, "epochs": 3},
            "batch": {"global_size": 11, "micro_size": 1},
            "run": {"out": str(out), "precision": "fp32", "eval_every": 0, "save_every": 5},
        }
        for name, section in sections.items():
            made[name] = made[name] | section if isinstance(section, dict) else section
        return made

    return make


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """`run_jobs(way, [values, …])`: train all of them, one after another, on one group of ranks."""

    def start(way: str | Path, jobs: list[Values], **more: str) -> None:
        listed = tmp_path_factory.mktemp("jobs") / "jobs.json"
        listed.write_text(json.dumps(jobs), encoding="utf-8")
        program = str(Path(__file__).with_name("many_runs.py"))
        done = subprocess.run(
            command(way, program, str(listed)),
            cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]

    return start
