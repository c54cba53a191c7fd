"""Directories of TRL, AutoTrain and the Trainer: what is an adapter in them, and which one to use, is said plainly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from peftune.cli import main

Captured = pytest.CaptureFixture[str]
MakeAdapter = Callable[..., Path]


@pytest.fixture
def run(make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    """The output of a run that was stopped: three checkpoints with the Trainer's files beside the adapter."""
    made = make_adapter("made")
    directory = tmp_path / "trl"
    for step in (9, 100, 20):
        checkpoint = shutil.copytree(made, directory / f"checkpoint-{step}")
        state = {"global_step": step, "best_model_checkpoint": str(directory / "checkpoint-20")}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        (checkpoint / "optimizer.pt").write_bytes(b"not to be read")
        (checkpoint / "training_args.bin").write_bytes(b"nor this")
    return directory


@pytest.mark.parametrize("verb", ["show", "import"])
def test_several_checkpoints_are_named_and_the_last_is_advised(
    run: Path, tmp_path: Path, capsys: Captured, verb: str
) -> None:
    options = ["--out", str(tmp_path / "out")] if verb == "import" else []
    assert main.run(["adapters", verb, str(run), *options]) == 2
    err = capsys.readouterr().err
    assert f"pass {run / 'checkpoint-100'}, the last of the run" in err and "the best" in err and "checkpoint-20" in err
    assert err.count("\n") == 1


def test_list_says_which_to_use(run: Path, make_adapter: MakeAdapter, tmp_path: Path, capsys: Captured) -> None:
    assert main.run(["adapters", "list", str(run)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint-9" in out and f"pass {run / 'checkpoint-100'}, the last of the run" in out
    shutil.copytree(make_adapter("made-too"), run, dirs_exist_ok=True)
    assert main.run(["adapters", "list", str(run)]) == 0
    assert f"{run} is the result of a run" in capsys.readouterr().out
    assert main.run(["adapters", "show", str(run)]) == 0


def test_the_only_adapter_inside_is_taken_and_pickles_become_safetensors(
    tiny_base: Path, tools: SimpleNamespace, make_adapter: MakeAdapter, tmp_path: Path, capsys: Captured
) -> None:
    inner = shutil.copytree(make_adapter("made"), tmp_path / "autotrain" / "checkpoint-7")
    tensors = load_file(inner / "adapter_model.safetensors")
    wanted = tools.logits_with_peft(tiny_base, inner)
    torch.save(tensors, inner / "adapter_model.bin")
    (inner / "adapter_model.safetensors").unlink()
    out = tmp_path / "out"
    asked = [str(tmp_path / "autotrain"), "--base", str(tiny_base), "--out", str(out)]
    assert main.run(["adapters", "import", *asked]) == 0
    assert str(inner) in capsys.readouterr().out
    assert torch.equal(tools.logits_with_peft(tiny_base, out), wanted)
    assert not (out / "adapter_model.bin").exists()
    assert json.loads((out / "peftune.json").read_text())["base_fingerprint"]


def test_a_directory_without_any_adapter_is_no_riddle(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "empty" / "logs").mkdir(parents=True)
    assert main.run(["adapters", "import", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "no adapter_config.json in this directory" in capsys.readouterr().err
