"""The first hour on a GPU, rehearsed on a CPU: every part is a command that exists, ends in time, and leaves JSON."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import options

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "first-gpu-hour.sh"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PEFTUNE_PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def listed() -> list[tuple[str, int, list[str]]]:
    lines = run("--list").stdout.splitlines()
    return [(name, int(seconds), shlex.split(rest)) for name, seconds, rest in (line.split(" ", 2) for line in lines)]


def test_the_parts_take_an_hour_at_most_and_each_fits_one_command_of_ten_minutes() -> None:
    parts = listed()
    assert len({name for name, *_ in parts}) == len(parts) >= 14
    assert sum(seconds for _, seconds, _ in parts) <= 3600 and max(seconds for _, seconds, _ in parts) < 600


@pytest.mark.parametrize(("name", "seconds", "command"), listed())
def test_each_part_is_a_command_with_options_that_it_has(
    name: str, seconds: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(arguments: object) -> None:
        raise InterruptedError  # understood, nothing measured

    module, *rest = command
    monkeypatch.setattr(options, "prepared", stop)
    for more in ([], ["--quick", "--device", "cpu", "--rounds", "1"]):
        with pytest.raises(InterruptedError):
            options.main(module, importlib.import_module(f"benchmarks.{module}").BENCHMARKS, [*rest, *more])


def test_a_rehearsal_leaves_json_for_each_part_and_a_second_start_does_nothing_twice(tmp_path: Path) -> None:
    variables = {"OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path), "PEFTUNE_REHEARSAL": "yes"}
    done = run("head", "profile", "b11-xl", **variables)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert found.keys() == {"head", "profile", "b11-xl"}
    assert all(result["machine"]["versions"]["torch"] for result in found.values())
    assert found["profile"]["settings"]["tokens a step"] > 0 and len(found["profile"]["notes"]) > 10
    measured = [row["what"] for row in found["head"]["rows"] if row["measured"]]
    assert len(measured) == 4 and not any("kernel" in what for what in measured)  # which a CPU does not have
    assert [c["name"] for c in found["b11-xl"]["contestants"] if c["figures"]] == ["peftune", "calibration"]
    assert found["b11-xl"]["rows"][-1]["against"] == "CPU"
    parts = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    assert [(part["part"], part["exit_code"]) for part in parts] == [("b11-xl", 0), ("head", 0), ("profile", 0)]
    (out / "head.json").unlink()
    again = run("head", "profile", **variables, PEFTUNE_WHEELS="")
    assert "profile: done already" in again.stderr and (out / "head.json").exists()


def test_a_part_that_fails_is_told_and_the_next_one_is_run(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    fails_in_head = 'case "$*" in *head*) echo no memory; exit 7;; esac'
    writes_its_last_argument = 'for last; do :; done; echo {} >"$last"'
    broken.write_text(f"#!/bin/sh\n{fails_in_head}\n{writes_its_last_argument}\n")
    broken.chmod(0o700)
    done = run("head", "profile", OUT=str(tmp_path / "out"), TMPDIR=str(tmp_path), PEFTUNE_PYTHON=str(broken))
    assert done.returncode == 1 and "head: ended with 7" in done.stderr and "no memory" in done.stderr
    assert (tmp_path / "out" / "profile.json").exists() and "1 parts without a result" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ([], {}, "OUT is missing"),
        (["haed"], {"OUT": "."}, "no part haed; there are: holds"),
        ([], {"OUT": ".", "PEFTUNE_PYTHON": "./none"}, "PEFTUNE_PYTHON is ./none"),
    ],
)
def test_what_is_missing_is_one_line(
    arguments: list[str], variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    done = run(*arguments, **variables)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
