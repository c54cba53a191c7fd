"""The batch script runs under stand-ins for `srun` and `scontrol` that start the real launchers, one for a node."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATCH = ROOT / "launch" / "slurm.sbatch"

# One task for each node; ends with the largest of their codes, and kills them when it gets SIGTERM, as the real one.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >>"$FAKE/srun-asked"; shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" & tasks+=($!)
done
echo "${tasks[@]}" >"$FAKE/tasks"
trap 'kill -KILL "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
  wait "$task"; code=$?
  ((code > worst)) && worst=$code
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) printf '%s\\n' localhost other ;;
*) echo "$@" >>"$FAKE/scontrol-asked" ;;
esac
"""
SCANCEL = """#!/usr/bin/env bash
[[ "$*" == "--signal=TERM 4711" ]] && kill -TERM $(<"$FAKE/tasks")
"""


@pytest.fixture
def slurm(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on a cluster of one node that plays two."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return environment | {
        "PATH": f"{tmp_path}:{environment['PATH']}", "FAKE": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "NPROC": "1",
        "MASTER_PORT": str(port), "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip


def read_until(process: subprocess.Popen[str], text: str, times: int) -> None:
    assert process.stdout is not None
    while times:
        line = process.stdout.readline()
        assert line, "the job ended early"
        times -= text in line


@pytest.mark.slow
def test_ahead_of_the_time_limit_every_node_saves_and_the_job_queues_again(
    slurm: dict[str, str], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "script").write_text(BATCH.read_text())  # SLURM runs a copy
    process = start(["bash", str(tmp_path / "script"), "cpu-2", "recipe", "seconds=60", "save=1"], **slurm)
    read_until(process, "of 2", 2)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert (tmp_path / "scontrol-asked").read_text() == "requeue 4711\n"
    assert "--kill-on-bad-exit=0" in (tmp_path / "srun-asked").read_text()


def test_a_job_that_is_stopped_by_hand_saves_and_does_not_queue_again(
    slurm: dict[str, str], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(["bash", str(BATCH), "cpu", "recipe", "seconds=60"], **slurm | {"SLURM_JOB_NUM_NODES": "1"})
    read_until(process, "of 1", 1)
    process.terminate()  # of no account to the script itself
    subprocess.run([str(tmp_path / "scancel"), "--signal=TERM", "4711"], env=slurm, check=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert not (tmp_path / "scontrol-asked").exists()


def test_a_forgotten_recipe_is_asked_for(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(BATCH), "zero2"], env=slurm, capture_output=True, text=True)
    assert done.returncode == 2 and "expected CONFIG RECIPE" in done.stderr


def test_ranks_have_less_time_to_save_than_the_limit_leaves() -> None:
    text = BATCH.read_text()
    ahead = int(text.split("--signal=B:USR1@")[1].split()[0])
    assert ahead >= 110 + 30  # PEFTUNE_GRACE, and what the launcher needs before and after
    assert "#SBATCH --requeue" in text and "#SBATCH --open-mode=append" in text
