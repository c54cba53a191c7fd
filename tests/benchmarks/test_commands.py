"""Every command explains itself, takes turns with its peers, and times nothing that is wrong."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import all as everything
from benchmarks import train
from benchmarks.harness.options import DECLARED, chosen
from benchmarks.harness.ours import gate
from benchmarks.harness.workers import Contestant, Failed, interleave

MODULES = ("train", "decode", "serve", "merge", "data", "ranks", "gpu", "fleet")
COMMANDS = [f"{m} {name}" for m in MODULES for name in importlib.import_module(f"benchmarks.{m}").BENCHMARKS]


@pytest.mark.parametrize("command", [*COMMANDS, "all"])
def test_every_command_has_help_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *name = command.split()
    monkeypatch.setattr(sys, "argv", [module, *name, "--help"])
    with pytest.raises(SystemExit) as ended:
        imported = importlib.import_module(f"benchmarks.{module}")
        imported.main(module, imported.BENCHMARKS) if name else imported.main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{command}" in capsys.readouterr().out


def test_the_page_names_every_command() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert [command for command in [*COMMANDS, "all"] if f"`{command}`" not in page] == []
    assert set(everything.COMMANDS.values()) <= set(COMMANDS)


@pytest.mark.slow
def test_a_quick_run_passes_the_gate_and_measures_ours_and_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"It was day {i} of a long voyage, and the sea was calm.\n" * 9 for i in range(99)))
    options = ["--quick", "--peers", "peft-bf16", "--rounds", "1", "--warmup", "0"]
    options += ["--json", str(out), "--data", str(text)]
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path))  # the command sets its own; this restores it
    train.main("train", train.BENCHMARKS, ["full", *options])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert "fp32 gradients" in found["gate"]
    names = [c["name"] for c in found["contestants"] if c["figures"]]
    assert {"peftune", "peft-bf16", "calibration"} <= set(names)
    assert found["rows"][0]["status"] in ("met", "missed")
    assert "peft-bf16" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "quick"), [("cpu", False), ("cuda", False), ("cuda", True)])
def test_without_a_gpu_its_benchmark_measures_nothing(device: str, quick: bool) -> None:
    setup: Any = SimpleNamespace(arguments=SimpleNamespace(device=device, quick=quick, shape="small"))
    assert [(row.status, row.reason) for row in train.gpu(setup).rows] == [("not run", "no CUDA device")]


def test_nothing_is_timed_behind_a_closed_gate() -> None:
    class Wrong:
        arguments = type("Arguments", (), {"gate_blocks": 1, "ours": []})

        def recipe(self, *_: object, **__: object) -> dict[str, dict[str, str]]:
            return {"run": {}}

        def interleave(self, judges: list[Contestant], **_: object) -> None:
            judges[0].rounds.append({"value": 1.5, "worst": {"fp32": 1.5e-5, "bf16": 1e-3}})

    with pytest.raises(SystemExit, match="the gate is closed"):
        gate(Wrong())  # type: ignore[arg-type]


def test_a_peer_that_cannot_run_is_told_with_its_reason_and_ours_must_run() -> None:
    peer = Contestant("absent", "benchmarks.absent", {}, "tok/s")
    interleave([peer], 1, 0, {})
    assert peer.rounds == [] and "No module named 'benchmarks.absent'" in str(peer.failure)
    with pytest.raises(Failed, match="absent"):
        interleave([Contestant("ours", "benchmarks.absent", {}, "tok/s", must_run=True)], 1, 0, {})


def test_a_peer_is_tuned_and_added_by_options() -> None:
    tunes = ["trl-tuned:per_device_train_batch_size=3", "trl-tuned:dropout=0.2", "mine:attention=eager"]
    tuned, mine = chosen("trl-tuned", tunes, ['{"name": "mine", "trainer": "loop"}'])
    assert tuned.arguments["per_device_train_batch_size"] == 3 and tuned.arguments["packing"]
    assert tuned.dropout == 0.2 and mine.attention == "eager"
    with pytest.raises(ValueError, match="known are trl-default"):
        chosen("trl-tunned", [], [])
    with pytest.raises(ValueError, match="expected NAME:KEY=VALUE"):
        chosen("trl-tuned", ["packing=true"], [])


def test_every_option_has_a_help_and_quick_knows_none_besides() -> None:
    used = {option for command in DECLARED["commands"].values() for option in command}
    assert set(DECLARED["commands"]) == set(COMMANDS)
    assert used == set(DECLARED["help"])
    own = {command: quick for command, quick in DECLARED["quick"].items() if isinstance(quick, dict)}
    assert set(DECLARED["quick"]) - set(own) <= used
    assert own and all(set(quick) <= set(DECLARED["commands"][command]) for command, quick in own.items())
