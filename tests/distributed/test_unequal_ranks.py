"""Ranks that were started on unequal things refuse to train, on all of them, and say which of them has what."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu-2.yaml"]
Ended = dict[str, list[tuple[int, str, dict[str, int]]]]
TEXT = "".join(f"the cat sat on mat {n} and the dog on the log\n\n" for n in range(40))


def change_text(folder: Path) -> None:
    (folder / "train.txt").write_text(TEXT.replace("mat 7", "mat 8"))


def change_held_out_text(folder: Path) -> None:
    (folder / "held.txt").write_text("one dog ran\n\n")


def change_weights(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.wpe.weight"][3, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(file: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def change_merges(folder: Path) -> None:
    path = folder / "base" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"].pop()
    path.write_text(json.dumps(values))


def change_recipe(section: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe[section] |= values
        path.write_text(yaml.safe_dump(recipe))

    return change


def keep_another_checkpoint(folder: Path) -> None:
    """In a directory of its own, which only the first rank's would be."""
    change_recipe("run", out="elsewhere")(folder)
    (folder / "elsewhere" / "checkpoints" / "step-9").mkdir(parents=True)


# What the second rank has otherwise, and what the line says of it; nothing where that must not matter.
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "training text": (change_text, "fingerprint of data train"),
    "held-out text": (change_held_out_text, "fingerprint of data validation/validation"),
    "weights": (change_weights, "fingerprint of base"),
    "configuration": (change_json("base/config.json", "layer_norm_epsilon", 1e-4), "the base's layer_norm_epsilon"),
    "tokenizer": (change_merges, "fingerprint of tokenizer"),
    "rate": (change_recipe("optim", lr=0.011), "optim.lr 0.011 where rank 0 has 0.01"),
    "evaluations": (change_recipe("run", eval_every=1), "run.eval_every 1 where rank 0 has 0"),
    "seed": (change_recipe("run", seed=7), "run.seed 7"),
    "peftune": (change_json("patch.json", "peftune", "0.0.9"), "peftune 0.0.9"),
    "torch": (change_json("patch.json", "torch", "2.6.0"), "torch 2.6.0"),
    "precision": (change_json("patch.json", "precision", "bf16"), "precision bf16 where rank 0 has fp32"),
    "directory": (keep_another_checkpoint, ""),
    "nothing": (lambda folder: None, ""),
}


@pytest.fixture(scope="module")
def ended(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """(exit code, message, how often what) of each rank in each case; the two ranks are started once for all cases."""
    folder = tmp_path_factory.mktemp("unequal ranks")
    recipe = {
        "base": "base",
        "data": {"train": "train.txt", "validation": "held.txt"},
        "lora": {"rank": 2},
        "optim": {"lr": 0.01, "steps": 2},
        "batch": {"global_size": 4, "micro_size": 2},
        "run": {"out": "out", "precision": "fp32", "eval_every": 0, "save_every": 0},
    }
    for case, (change, _) in CASES.items():
        for rank in ("0", "1"):
            here = folder / case / rank
            shutil.copytree(tiny_base, here / "base")
            (here / "train.txt").write_text(TEXT)
            (here / "held.txt").write_text("the dog sat on my log\n\n")
            (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            (here / "patch.json").write_text("{}")
        change(folder / case / "1")
    (folder / "cases.json").write_text(json.dumps([*CASES]))
    program = str(Path(__file__).with_name("unequal_ranks.py"))
    done = subprocess.run(
        [*LAUNCH, program, str(folder)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return {
        case: [tuple(json.loads((folder / case / rank / "ended.json").read_text())) for rank in ("0", "1")]
        for case in CASES
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_that_differ_end_with_2_and_the_first_says_how(ended: Ended, case: str) -> None:
    said = CASES[case][1]
    (code, line, _), (other_code, other_line, _) = ended[case]
    if not said:
        assert (code, other_code) == (0, 0)
        return
    assert (code, other_code, other_line) == (2, 2, "")
    assert "rank 1 on" in line and said in line and "\n" not in line


@pytest.mark.slow
def test_the_first_rank_alone_looks_for_shared_passages_and_foresees_the_memory(ended: Ended) -> None:
    assert [done for _, _, done in ended["nothing"]] == [{"of_run": 1, "activations": 1}, {}]
