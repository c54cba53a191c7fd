"""A signal is answered within seconds at every stage: one line, the documented code, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
SECONDS = 5.0

# Where, how, which signal, exit code; what follows a code of 3 is that the same command goes on.
STAGES: dict[str, tuple[str, str, str, int]] = {
    "read": ("peftune.training.inputs:open_base", "python", "SIGINT", 130),
    "tokenise": ("peftune.data.tokens.pipeline:tokenize_batch", "pool", "SIGTERM", 143),
    "micro-size": ("peftune.training.loading:first_micro_size", "python", "SIGHUP", 129),
    "load": ("peftune.training.loading:load_adapted", "pool", "SIGTERM", 143),
    "evaluate": ("peftune.training.run:evaluate_domain", "soon", "SIGTERM", 3),
    "score": ("peftune.training.step:ForwardFn.__call__", "python", "SIGTERM", 3),
    "train": ("peftune.training.step:Gradient.add", "python", "SIGINT", 3),
    "sample": ("peftune.training.validation:generate_with_transformers", "python", "SIGTERM", 3),
    "save": ("peftune.training.checkpoint:save_tensors", "soon", "SIGTERM", 3),
    "deliver": ("peftune.adapters.directory:read_adapter", "python", "SIGTERM", 3),
}
VERBS = {
    "merge": ("peftune.adapters.merge.merge:write_weights", "python", "SIGTERM", 143),
    "merge-hung": ("peftune.adapters.merge.merge:verify_merge", "pool", "SIGINT", 130),
    "eval": ("peftune.model.base:Base.weights.func", "python", "SIGTERM", 143),
    "generate": ("peftune.inference.bank:AdapterBank.__init__", "python", "SIGINT", 130),
    "data": ("peftune.data.tokens.pipeline:tokenize_batch", "pool", "SIGINT", 130),
    "combine": ("peftune.adapters.directory:publish", "python", "SIGTERM", 143),
    "extract": ("peftune.adapters.directory:publish", "pool", "SIGTERM", 143),
    "serve": ("peftune.serve.server:make_service", "python", "SIGTERM", 143),
}
CASES = STAGES | VERBS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped")


def arguments(case: str, folder: Path, base: Path, adapters: dict[str, Path]) -> list[str]:
    if case in STAGES:
        own = [f"run.out={folder / case}", f"data.train={folder / case}.txt"]
        return ["train", str(folder / "recipe.yaml"), *own, *["run.samples=[the]"] * (case == "sample")]
    out, attention = str(folder / case), str(adapters["attention"])
    on = ["--base", str(base)]
    return {
        "merge": ["merge", attention, "--out", out, *on],
        "merge-hung": ["merge", attention, "--out", out, *on],
        "eval": ["eval", *on, "--data", f"x={folder / 'read.txt'}"],
        "generate": ["generate", *on, "--prompt", "the"],
        "data": ["data", str(folder / "data.txt"), *on],
        "combine": ["adapters", "combine", attention, attention, "--weights", "1,1", "--out", out, *on],
        "extract": ["adapters", "extract", *on, "--tuned", str(folder / "tuned"), "--rank", "2", "--out", out],
        "serve": ["serve", *on, "--port", "0"],
    }[case]


@pytest.fixture(scope="module")
def results(folder: Path, base_directory: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    """How each case ended."""
    recipe = {
        "base": str(base_directory),
        "data": {"validation": 0.2},
        "lora": {"rank": 2},
        "optim": {"steps": 2},
        "batch": {"global_size": 4},
        "run": {"out": "set by each case", "precision": "fp32", "save_every": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(base_directory, folder / "tuned")
    tensors = load_file(base_directory / "model.safetensors")
    tensors["transformer.h.0.attn.c_attn.weight"] *= 1.5
    save_file(tensors, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    for case in CASES:  # a text of its own each, or it would be in the cache
        (folder / f"{case}.txt").write_text("".join(f"the cat of {case} sat on mat {n}\n\n" for n in range(40)))
    cases = [
        {"name": name, "arguments": arguments(name, folder, base_directory, adapters), "place": place, "how": how,
         "signal": number}
        for name, (place, how, number, _) in CASES.items()
    ]  # fmt: skip
    (folder / "CASES.json").write_text(json.dumps(cases))
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PEFTUNE_CACHE": str(folder / "cache")}
    command = [sys.executable, str(Path(__file__).with_name("stopped_at.py")), str(folder / "CASES.json")]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "RESULTS.json").read_text())
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("case", CASES)
def test_a_signal_is_answered_at_once_in_one_line(results: dict[str, Any], folder: Path, case: str) -> None:
    number, code = CASES[case][2:]
    ended = results[case]
    assert ended["reached"] and ended["code"] == code, ended
    assert ended["seconds"] < SECONDS
    ours = [line for line in ended["said"].splitlines() if number in line]
    assert len(ours) == 1 and "Traceback" not in ended["said"], ended["said"]
    assert ("the same command" in ours[0]) and (code != 3 or "checkpoint saved" in ours[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_nothing_half_written_is_left(results: dict[str, Any], folder: Path) -> None:
    staged = [path for path in folder.rglob(".*") if path.name != ".lock"]
    assert staged == []
    assert not any((folder / case).exists() for case in ("merge", "merge-hung", "combine", "extract"))
    for case in ("evaluate", "score", "train", "sample", "save", "deliver"):
        assert any((folder / case / "checkpoints").glob("step-*/state.json")), case


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_libraries_are_imported_is_answered_too(number: int, folder: Path, tiny_base: Path) -> None:
    (folder / "early.txt").write_text("the cat\n\nthe dog\n\n")
    command = [sys.executable, "-m", "peftune", "data", str(folder / "early.txt"), "--base", str(tiny_base)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=-1, stdout=-1, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert time.monotonic() - began < SECONDS
    assert said.count("\n") == 1 and said.startswith("peftune: stopped by SIG"), said
