"""Real ranks over gloo, started as a person starts them; a corpus on which unequal ranks would show."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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


class Group:
    """One group of ranks that trains lists of recipes as they are given to it; it sleeps between them."""

    def __init__(self, way: str | Path, folder: Path, lists: int, **more: str) -> None:
        self.files = [folder / f"jobs-{number}.json" for number in range(lists)]
        self.given = 0
        self.log = folder / "log"
        program = str(Path(__file__).with_name("many_runs.py"))
        with open(self.log, "wb") as told:
            self.process = subprocess.Popen(
                command(way, program, *map(str, self.files)),
                cwd=ROOT, env=environment(**more), stdout=told, stderr=told, start_new_session=True,
            )  # fmt: skip

    def train(self, jobs: list[Any]) -> None:
        """All of them, one after another; returns when the last has been delivered, or the ranks have ended."""
        file = self.files[self.given]
        self.given += 1
        beside = file.with_suffix(".beside")
        beside.write_text(json.dumps(jobs), encoding="utf-8")
        beside.rename(file)
        until = time.monotonic() + 300
        while not file.with_suffix(".done").exists():
            assert self.process.poll() is None and time.monotonic() < until, self.told()
            time.sleep(0.05)
        if self.given == len(self.files):
            assert self.process.wait(timeout=60) == 0, self.told()

    def told(self) -> str:
        return self.log.read_text(encoding="utf-8")[-6000:]

    def remove(self) -> None:
        """Nothing of it is left behind, whatever became of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Group]]:
    """`group(way, lists=n)`: ranks that train n lists of recipes, with one start-up."""
    started: list[Group] = []

    def start(way: str | Path, lists: int = 1, **more: str) -> Group:
        started.append(Group(way, tmp_path_factory.mktemp("jobs"), lists, **more))
        return started[-1]

    yield start
    for ranks in started:
        ranks.remove()


@pytest.fixture(scope="session")
def run_jobs(group: Callable[..., Group]) -> Callable[..., None]:
    """`run_jobs(way, [values, …])`: train all of them, one after another, on one group of ranks."""
    return lambda way, jobs, **more: group(way, **more).train(jobs)
