"""Two machines for real, as far as the network goes: two network namespaces joined by a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from peftune.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "launch" / "rank.py"
pytestmark = pytest.mark.slow
STEPS = 80
Distance = Callable[[Path, Path], float]


class Machines:
    """Two namespaces, `addresses[0]` and `addresses[1]`, each with a loopback and one end of the cable."""

    def __init__(self) -> None:
        self.spaces = [f"pt{os.getpid()}{end}" for end in "ab"]
        self.cables = [f"pt{os.getpid()}{end}c"[-15:] for end in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.started: list[subprocess.Popen[str]] = []

    def build(self) -> None:
        for space in self.spaces:
            ip("netns", "add", space)
        here, there = self.cables
        ip("link", "add", here, "netns", self.spaces[0], "type", "veth", "peer", "name", there, "netns", self.spaces[1])
        for space, cable, address in zip(self.spaces, self.cables, self.addresses, strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", cable, "up")

    def cut(self) -> None:
        """As when someone pulls the plug: nothing arrives any more, and nobody is told."""
        ip("-n", self.spaces[1], "link", "set", self.cables[1], "down")

    def mend(self) -> None:
        ip("-n", self.spaces[1], "link", "set", self.cables[1], "up")
        self.started.clear()

    def launch(self, *arguments: str, program: Path | None, **variables: str) -> None:
        """The same command on both machines; `program` runs in each rank in the place of `peftune train`."""
        given = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SLURM_"))}
        given |= {
            "PEFTUNE_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "NNODES": "2", "NPROC": "1", "MASTER_ADDR": self.addresses[0], **variables,
        }  # fmt: skip
        if program:
            given["PEFTUNE_RANK_PROGRAM"] = str(program)
        for number, space in enumerate(self.spaces):
            self.started.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", space, "bash", str(ROOT / "launch" / "multinode.sh"), *arguments],
                    env=given | {"NODE_RANK": str(number)}, start_new_session=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
            )  # fmt: skip

    def ended(self, seconds: float) -> tuple[list[int], list[str]]:
        """Exit codes and what was printed since, by machine; TimeoutExpired where it takes longer than that in all."""
        until = time.monotonic() + seconds
        told = [process.communicate(timeout=max(1, until - time.monotonic()))[0] for process in self.started]
        return [process.returncode for process in self.started], told

    def remove(self) -> None:
        for space in self.spaces:
            inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
            for pid in inside.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        for process in self.started:
            process.wait(10)
            if process.stdout:
                process.stdout.close()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    two = Machines()
    try:
        if shutil.which("ip") is None:
            pytest.skip("there is no `ip` here to make network namespaces with")
        try:
            two.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield two
    finally:
        two.remove()


def test_a_rank_killed_on_one_machine_starts_again_on_both(machines: Machines, tmp_path: Path) -> None:
    out = tmp_path / "out"
    machines.launch("cpu-2", "recipe", "kill=1", "seconds=2", f"out={out}", program=STAND_IN, MAX_RESTARTS="1")
    codes, told = machines.ended(60)
    assert codes == [0, 0], told
    assert out.read_text() == "adapter of 2 ranks, trained on 0\n"


def written_recipe(base: Path, folder: Path) -> Path:
    """Two hundred short documents, four blocks to a step, a checkpoint every five; the adapter beside the recipe."""
    text = folder / "text.txt"
    text.write_text("".join(f"the cat sat on mat number {n} and the dog on the log\n\n" for n in range(200)))
    values = {
        "base": str(base),
        "data": {"train": [str(text)], "validation": 0.1, "block_size": 64},
        "lora": {"rank": 4, "alpha": 8},
        "optim": {"lr": 1e-2, "steps": STEPS},
        "batch": {"global_size": 4, "micro_size": 2},
        "run": {"out": str(folder / "adapter"), "precision": "fp32", "eval_every": 0, "save_every": 5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Path:
    return written_recipe(tiny_base, tmp_path)


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "peftune", "train", str(written_recipe(tiny_base, folder))]
    subprocess.run(command, env=given, check=True, capture_output=True, timeout=120)
    return folder / "adapter"


def steps_told(out: Path) -> list[int]:
    return [event["step"] for event in read_metrics(out / "metrics.jsonl") if event["event"] == "train"]


def test_two_machines_share_out_a_base_and_train_one_adapter(
    machines: Machines, recipe: Path, alone: Path, tmp_path: Path, distance: Distance
) -> None:
    """1e-5: ZeRO-3 goes by Transformers' and PEFT's steps, one process by fast ones."""
    machines.launch("cpu-2-zero3", str(recipe), program=None)
    codes, told = machines.ended(150)
    assert codes == [0, 0], told
    assert distance(tmp_path / "adapter", alone) <= 1e-5


def test_a_cut_cable_ends_the_run_which_goes_on_once_it_is_mended(
    machines: Machines, recipe: Path, alone: Path, tmp_path: Path, distance: Distance
) -> None:
    """Also what two machines under DDP learn: the adapter of one process."""
    out = tmp_path / "adapter"
    machines.launch("cpu-2", str(recipe), program=None, PEFTUNE_LOST_AFTER="8")
    until = time.monotonic() + 60
    while not any((out / "checkpoints").glob("step-*")):
        assert time.monotonic() < until, "no checkpoint within a minute"
        time.sleep(0.05)
    machines.cut()
    codes, told = machines.ended(60)
    assert codes == [1, 1], told
    for lines in told:
        assert "start the same command again" in lines or "the same command goes on" in lines
    assert len(steps_told(out)) < STEPS, "the cable was cut after the last step"
    machines.mend()
    machines.launch("cpu-2", str(recipe), program=None)
    codes, told = machines.ended(100)
    assert codes == [0, 0], told
    assert steps_told(out) == [*range(1, STEPS + 1)]
    assert distance(out, alone) <= 1e-6
