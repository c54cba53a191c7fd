"""What a check of `peftune doctor` found, and how a program is started that may crash or never end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Verdict = Literal["fine", "slower", "broken"]


@dataclass(frozen=True)
class CheckResult:
    """`text` says what was found; of what is slower also why, of what is broken also what to do."""

    name: str
    verdict: Verdict
    text: str

    def line(self) -> str:
        """For people."""
        says = {"fine": "fine: ", "slower": "slower than it could be because ", "broken": "will not work: "}
        return f"{self.name}: {says[self.verdict]}{self.text}"


@dataclass(frozen=True)
class Answer:
    """How a program ended: its output, and in `failure` one line where it did not end well."""

    output: str
    failure: str | None


def bounded(
    words: Sequence[str], seconds: float, folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> Answer:
    """Run Python with these words as a program of its own, which ends, with all that it started, after so long."""
    process = subprocess.Popen(
        [sys.executable, *words], cwd=folder, env={**os.environ, **(variables or {})}, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer within {seconds:.0f} s")
    finally:
        _end(process)
    if process.returncode == 0:
        return Answer(output, None)
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    ours = [line.removeprefix("peftune: ") for line in lines if line.startswith("peftune: ")]
    by_signal = f"ended by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else "ended in silence"
    return Answer(output, (ours or lines or [by_signal])[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a program that still runs, and all that it started: torch's launcher gives ranks sessions of their own."""
    if process.poll() is None:
        with suppress(psutil.Error):
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
