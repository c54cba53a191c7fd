"""What the tests of the scripts in launch/ start them with: this interpreter, and a stand-in for `peftune train`."""

from __future__ import annotations

import os
import sys
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
