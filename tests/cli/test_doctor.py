"""`peftune doctor`: each verdict where it is due, an end whatever a program does, and exit code 2 where work is due."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from peftune.cli import main
from peftune.cli.checks import libraries, machine, runs
from peftune.cli.checks.result import CheckResult, bounded

FACTS: dict[str, Any] = {"cpu": "AVX512", "bf16": True, "threads": 2, "driver": None, "no_gpu": "", "gpus": []}


def verdicts(results: Any) -> dict[str, str]:
    return {result.name: result.verdict for result in results}


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Cores of the machine, in a container without limits; its directory of limits."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(machine, "_CONTROL_GROUP", tmp_path)
    return tmp_path


def test_a_program_that_never_ends_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    sleep = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    code = (
        f"import subprocess, sys, time; child = subprocess.Popen({sleep}, start_new_session=True);"
        "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(600)"
    )
    names = bounded(("-c", "import os; print(os.getcwd())"), 60.0, Path("/"))
    assert names.output == "/\n" and names.failure is None
    file = tmp_path / "pid"
    answer = bounded(("-c", code, str(file)), 5.0)
    assert answer.failure == "no answer within 5 s"
    child = int(file.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import sys; sys.exit('peftune: the reason\\nand more')", "the reason"),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("import sys; sys.exit(3)", "ended in silence"),
    ],
)
def test_a_program_that_fails_says_why_in_one_line(code: str, failure: str) -> None:
    assert bounded(("-c", code), 60.0).failure == failure


def test_torch_is_asked_in_a_program_of_its_own() -> None:
    facts, reason = runs.torch_facts()
    assert reason == "" and facts is not None and facts.keys() == FACTS.keys() and facts["threads"] >= 1


def test_a_run_that_is_refused_is_broken_with_its_reason() -> None:
    result = runs.check_run("training", ["train", "r.yaml", "lora.rank=0"])
    assert result.verdict == "broken" and "lora.rank" in result.text and "\n" not in result.text


def test_the_tries_follow_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "has_engine", lambda: False)
    monkeypatch.setattr("peftune.model.quantized.is_available", lambda: False)
    assert list(runs.runs_to_try(0)) == ["a training step", "two processes (gloo)"]
    monkeypatch.setattr(runs, "has_engine", lambda: True)
    monkeypatch.setattr("peftune.model.quantized.is_available", lambda: True)
    several = runs.runs_to_try(2)
    assert {"two GPUs (NCCL)", "DeepSpeed (ZeRO-2)"} <= several.keys() and len(several) == 6


def test_versions_are_compared_with_bounds_and_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    found, pinned = {"torch": "2.1.0", "rich": "99.0"}, libraries.tested_versions()

    def version(name: str) -> str:
        if name in ("typer", "wandb", "mlflow", "tensorboard", "optuna"):
            raise PackageNotFoundError(name)
        return found.get(name) or pinned[name.lower()]

    monkeypatch.setattr(libraries, "version", version)
    results = list(libraries.check_libraries())
    assert {name: v for name, v in verdicts(results).items() if v != "fine"} == {"torch": "broken", "typer": "broken"}
    texts = {result.name: result.text for result in results}
    assert "2.1.0 is here, >=2.6 is needed; pip install 'torch>=2.6'" in texts["torch"]
    assert re.fullmatch(r"99.0; tested with \d+\.\d+\.\d+", texts["rich"])
    assert "wandb (pip install 'peftune[track]')" in texts["not installed"]


@pytest.mark.parametrize(
    ("facts", "limits", "slower"),
    [
        ({}, {}, []),
        ({"bf16": False}, {}, ["CPU"]),
        ({"cpu": "DEFAULT"}, {}, ["CPU"]),
        ({"threads": 1}, {}, ["threads"]),
        ({"threads": 2}, {"cpu.max": "100000 100000"}, ["threads"]),
        ({"threads": 1}, {"cpu.max": "100000 100000"}, []),
        ({"threads": 2}, {"cpu.max": "max 100000"}, []),
    ],
)
def test_what_slows_a_processor_is_told(
    two_cores: Path, facts: dict[str, Any], limits: dict[str, str], slower: list[str]
) -> None:
    for name, text in limits.items():
        (two_cores / name).write_text(text)
    found = verdicts(machine.check_processor(FACTS | facts))
    assert [name for name, verdict in found.items() if verdict == "slower"] == slower and "broken" not in found.values()


def test_what_a_machine_lacks_is_broken(two_cores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    assert set(verdicts(machine.check_room()).values()) == {"fine"}
    (two_cores / "memory.max").write_text("900000000")
    (two_cores / "memory.current").write_text("1000000000")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    assert set(verdicts(machine.check_room()).values()) == {"broken"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_cache_that_others_may_write_to_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))
    assert verdicts(machine.check_caches()) == {"cache": "fine", "cache of the hub": "fine"}
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache").chmod(0o777)
    (result, _) = machine.check_caches()
    assert result.verdict == "broken" and "chmod -R go-w" in result.text


@pytest.mark.parametrize(("reason", "verdict"), [("", "fine"), ("a driver is here and torch has no CUDA", "broken")])
def test_a_gpu_that_torch_does_not_find_is_told_as_training_tells_it(reason: str, verdict: str) -> None:
    (result,) = runs.check_gpus(FACTS | {"no_gpu": reason})
    assert result.verdict == verdict and result.text.startswith(reason)


def test_a_gpu_that_computes_nothing_is_broken() -> None:
    """It is told of by the driver, and the machine has none."""
    facts = FACTS | {"gpus": [{"name": "Planned 9000", "capability": "9.0", "bytes": 24e9}]}
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (result,) = runs.check_gpus(facts)
    assert result.verdict == "broken" and "Planned 9000, 24 GB, compute capability 9.0" in result.text


@pytest.mark.gpu
def test_a_gpu_computes() -> None:
    facts, _ = runs.torch_facts()
    assert facts is not None and set(verdicts(runs.check_gpus(facts)).values()) == {"fine"}


@pytest.mark.parametrize(("verdict", "code"), [("fine", 0), ("slower", 0), ("broken", 2)])
def test_the_verb_prints_every_check_and_ends_with_2_where_one_is_broken(
    verdict: Any, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "torch_facts", lambda: (FACTS, ""))
    monkeypatch.setattr(runs, "check_run", lambda name, words: CheckResult(name, verdict, "[bold]so"))
    monkeypatch.setattr(machine, "check_room", lambda: iter(()))
    monkeypatch.setattr(libraries, "check_libraries", lambda: iter(()))
    assert main.run(["doctor"]) == code
    out, err = capfd.readouterr()
    says = {"fine": "fine: ", "slower": "slower than it could be because ", "broken": "will not work: "}[verdict]
    assert f"a training step: {says}[bold]so\n" in out and err == ""
    assert main.run(["doctor", "--json", "-"]) == code
    written = json.loads(capfd.readouterr().out)
    assert written["broken"] == (len(runs.runs_to_try(0)) if code else 0)
    assert {"name": "a training step", "verdict": verdict, "text": "[bold]so"} in written["checks"]


def test_a_torch_that_cannot_be_imported_is_told_and_ends_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "_FACTS", ("-c", "import no_such_torch"))
    monkeypatch.setattr(sys, "argv", ["peftune"])
    assert main.run(["doctor"]) == 2
    assert capfd.readouterr().out.endswith(
        "torch: will not work: ModuleNotFoundError: No module named 'no_such_torch'; install it again\n"
    )
