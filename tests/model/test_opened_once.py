"""A command opens config, tokenizer and weight headers of its base once each, and hands them down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROGRAM = Path(__file__).with_name("count_opens.py")
ONCE = {"config.json": 1, "tokenizer": 1, "weight headers": 1}


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """Trained by the command line on a cache of its own, so that nothing about the base is known beforehand."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat sat on mat number {n}" for n in range(30)))
    recipe = {
        "base": str(tiny_base),
        "data": {"train": "text.txt", "validation": 0.2},
        "optim": {"steps": 2},
        "batch": {"global_size": 4},
        "run": {"out": "adapter", "precision": "fp32", "samples": ["the"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert opened(tiny_base, tmp_path, "train", "recipe.yaml") == ONCE
    return tmp_path / "adapter"


def start(base: Path, folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PEFTUNE_CACHE": str(folder / f"cache-{command[0]}"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(base), str(folder / "counts.json"), *command],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def opened(base: Path, folder: Path, *command: str) -> dict[str, int]:
    process = start(base, folder, *command)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found: dict[str, int] = json.loads((folder / "counts.json").read_text())
    return found


def test_train_eval_and_merge_open_each_part_of_the_base_once(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    assert opened(tiny_base, tmp_path, "eval", "--adapter", "a=adapter", "--data", "d=text.txt") == ONCE
    assert opened(tiny_base, tmp_path, "merge", "adapter", "--out", "merged") == ONCE


def test_a_server_opens_each_part_of_the_base_once(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    process = start(tiny_base, tmp_path, "serve", "--base", str(tiny_base), "--adapter", "a=adapter", "--port", "0")
    assert process.stdout is not None
    assert "http://" in process.stdout.readline(), "the server did not start"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    process.communicate()
    assert json.loads((tmp_path / "counts.json").read_text()) == ONCE
