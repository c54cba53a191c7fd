"""Shell completion: the scripts that are shown, and what a shell is answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a shell that finds this program as `peftune`."""
    program = tmp_path / "peftune"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m peftune "$@"\n')
    program.chmod(0o755)
    root = str(Path(__file__).parents[2])
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": root}


def answer(environment: dict[str, str], *command: str, **variables: str) -> str:
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("typed", "found"),
    [("peftune ad", "adapters"), ("peftune adapters com", "combine compare"), ("peftune train --q", "--quiet")],
)
def test_bash_completes_verbs_and_options(environment: dict[str, str], typed: str, found: str) -> None:
    script = f"""
        eval "$(peftune --show-completion)"
        COMP_WORDS=({typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        $(complete -p peftune | sed 's/.*-F \\([^ ]*\\) .*/\\1/') peftune
        echo "${{COMPREPLY[@]}}"
    """
    assert answer(environment, "bash", "-c", script).split() == found.split()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_too(environment: dict[str, str], shell: str) -> None:
    script = answer(environment, "peftune", _PEFTUNE_COMPLETE=f"source_{shell}")
    assert f"complete_{shell}" in script and "_PEFTUNE_COMPLETE" in script
    asked = {"_PEFTUNE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "peftune ad"}
    shown = answer(environment, "peftune", **asked, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert "adapters" in shown and "quickstart" not in shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_is_installed_for_the_shell_that_asks(environment: dict[str, str], tmp_path: Path) -> None:
    said = answer(environment, "bash", "-c", "peftune --install-completion; true", HOME=str(tmp_path))
    (written,) = tmp_path.glob("**/peftune.sh")
    assert str(written) in said and str(written) in (tmp_path / ".bashrc").read_text()
