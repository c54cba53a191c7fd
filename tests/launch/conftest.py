"""What the tests of the scripts in launch/ start them with: this interpreter, and a stand-in for `peftune train`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a shell in which the scripts run this interpreter and tests/launch/rank.py, and nothing is installed."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SLURM_", "PEFTUNE_"))}
    return mine | {
        "PEFTUNE_PYTHON": sys.executable,
        "PEFTUNE_RANK_PROGRAM": str(ROOT / "tests" / "launch" / "rank.py"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start(command, NAME=value, …)` with both streams as pipes; what is left of it at the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], **variables: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                command, env=environment | variables, cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
