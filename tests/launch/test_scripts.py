"""The shell scripts are clean, and say in one line what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
NODES = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost", "NPROC": "1"}


def refused(script: str, arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    return done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")  # the development tools bring it
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is not installed; bash launch/test.sh installs it"
    done = subprocess.run(
        [program, "--external-sources", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh"])
def test_help_explains_every_variable_that_the_script_reads(script: str, environment: dict[str, str]) -> None:
    path = ROOT / "launch" / script
    told = subprocess.run(["bash", str(path), "--help"], env=environment, capture_output=True, text=True, check=True)
    words = ["MAX_RESTARTS", "PEFTUNE_GRACE", "PEFTUNE_PYTHON", "CONFIG", *(NODES if script == "multinode.sh" else [])]
    assert [word for word in words if word not in told.stdout] == []
    assert "set -euo" not in told.stdout


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_a_missing_variable_is_named(missing: str, environment: dict[str, str]) -> None:
    given = {name: value for name, value in NODES.items() if name != missing}
    assert f"{missing} is missing" in refused("multinode.sh", ["ddp", "recipe"], environment | given)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"NODE_RANK": "2"}, "NODE_RANK is 2, but with NNODES=2 the last one is 1"),
        ({"NNODES": "two"}, "NNODES is 'two', expected a number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', expected a number"),
        ({"NPROC": "0"}, "NPROC is '0', expected a number from 1"),
        ({"PEFTUNE_PYTHON": "/no/python"}, "PEFTUNE_PYTHON is /no/python"),
    ],
)
def test_a_wrong_variable_is_quoted(wrong: dict[str, str], told: str, environment: dict[str, str]) -> None:
    assert told in refused("multinode.sh", ["ddp", "recipe"], environment | NODES | wrong)


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh"])
def test_an_unknown_configuration_is_answered_with_the_known_ones(script: str, environment: dict[str, str]) -> None:
    assert "zero2-offload" in refused(script, ["zero4", "recipe"], environment | NODES)


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh"])
def test_a_forgotten_recipe_is_asked_for(script: str, environment: dict[str, str]) -> None:
    assert "expected CONFIG RECIPE" in refused(script, ["cpu-2"], environment | NODES)


def test_a_gpu_configuration_without_a_gpu_says_which_ones_need_none(environment: dict[str, str]) -> None:
    assert "cpu-2*.yaml need none" in refused("local.sh", ["ddp", "recipe"], environment | {"CUDA_VISIBLE_DEVICES": ""})


def test_more_ranks_than_a_configuration_starts_are_refused_instead_of_one_started(environment: dict[str, str]) -> None:
    assert "starts one process, so not 2" in refused("local.sh", ["cpu", "r"], environment | {"PEFTUNE_PROCESSES": "2"})
    assert "starts one process, so not 2" in refused("multinode.sh", ["cpu", "r"], environment | NODES)
