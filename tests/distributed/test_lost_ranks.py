"""Ranks that die, machines that stop them: the job ends with one clear line, and the same command goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from peftune.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 30
KILLS = int(os.environ.get("PEFTUNE_TEST_KILLS", "0"))  # at random, beside the two that are always made
Values = dict[str, Any]
Make = Callable[..., Values]


def launcher(way: str, recipe: Path, *options: str) -> list[str]:
    if way == "one":
        return [sys.executable, "-m", "peftune", "train", str(recipe)]
    return [sys.executable, "-m", "peftune", "launch", *options, way, str(recipe)]


def torchrun(rendezvous: str, recipe: Path) -> list[str]:
    """As docs/many-ranks.md has it, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {
        "static": ["--master-addr", "127.0.0.1", "--master-port", port],
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"],
    }[rendezvous]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *where]
    return [*start, "-m", "peftune", "train", str(recipe)]


def listening(job: subprocess.Popen[bytes]) -> dict[int, set[str]]:
    """Addresses on which a launcher and its ranks listen, by process."""
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    return {
        process.pid: {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        for process in processes
    }


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job in a session of its own; nothing of it is left behind."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PEFTUNE_GRACE": "40"}
    with open(log, "wb") as told:
        job = subprocess.Popen(command, cwd=ROOT, env=settings, stderr=told, stdout=told, start_new_session=True)
    try:
        yield job
    finally:
        for process in [*psutil.Process(job.pid).children(recursive=True)] if job.poll() is None else []:
            process.kill()
        job.kill()
        job.wait()


def rank_process(job: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process of a rank, by what its launcher told it; waits until it has been started."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in psutil.Process(job.pid).children(recursive=True):
            with suppress(psutil.Error):  # it ended meanwhile
                if process.environ().get("RANK") == str(rank):
                    return process
        time.sleep(0.05)
    raise AssertionError(f"no rank {rank} among {psutil.Process(job.pid).children(recursive=True)}")


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return max((e["step"] for e in read_metrics(path) if e["event"] == "train"), default=0) if path.exists() else 0


def wait_for_step(job: subprocess.Popen[bytes], out: Path, step: int, log: Path) -> None:
    end = time.monotonic() + 120
    while steps_done(out) < step:
        assert job.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def of_many_steps(values: Make, out: Path) -> Values:
    return values(out, optim={"steps": STEPS}, run={"save_every": 3})


@pytest.fixture
def recipe(values: Make, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe file of STEPS steps with a checkpoint every three, and its output directory."""
    path, out = tmp_path / "recipe.yaml", tmp_path / "adapter"
    path.write_text(yaml.safe_dump(of_many_steps(values, out)))
    return path, out


@pytest.fixture(scope="module")
def uninterrupted(values: Make, run_jobs: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "adapter"
    run_jobs("one", [of_many_steps(values, out)])
    return out


@pytest.fixture
def assert_same(distance: Callable[[Path, Path], float], uninterrupted: Path) -> Callable[[Path], None]:
    """The adapter that an uninterrupted run gives, to 1e-6 relative, and each step in the records once."""

    def check(out: Path) -> None:
        assert distance(out, uninterrupted) <= 1e-6
        told = [e["step"] for e in read_metrics(out / "metrics.jsonl") if e["event"] == "train"]
        assert told == [*range(1, STEPS + 1)]

    return check


@pytest.mark.slow
def test_killed_ranks_end_the_job_and_other_topologies_go_on(
    recipe: tuple[Path, Path], assert_same: Callable[[Path], None], tmp_path: Path
) -> None:
    """A rank of DDP, then one of ZeRO-3, then as many at random as asked for; one process takes the last steps."""
    path, out = recipe
    chance = random.Random(0)
    ways = ["cpu-2", "cpu-2-zero1", "cpu-2-zero2", "cpu-2-zero3"]
    chosen = [("cpu-2", 1), ("cpu-2-zero3", 0)]
    log = tmp_path / "log"
    for way, rank in chosen + [(chance.choice(ways), chance.randint(0, 1)) for _ in range(KILLS)]:
        before = steps_done(out)
        with running(launcher(way, path), log) as job:
            wait_for_step(job, out, min(STEPS - 5, before + 4), log)
            time.sleep(chance.random() * 0.1)
            rank_process(job, rank).send_signal(signal.SIGKILL)
            code = job.wait(timeout=60)
        told = log.read_text()
        assert code == 1, told
        assert "SIGKILL" in told and "goes on from the last checkpoint" in told and "Traceback" not in told
    with running(launcher("one", path), log) as job:
        assert job.wait(timeout=120) == 0, log.read_text()
    assert_same(out)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_on_all_ranks_and_exits_with_3(
    recipe: tuple[Path, Path], assert_same: Callable[[Path], None], tmp_path: Path
) -> None:
    path, out = recipe
    log = tmp_path / "log"
    with running(launcher("cpu-2-zero2", path), log) as job:
        wait_for_step(job, out, 4, log)
        assert set().union(*listening(job).values()) == {"127.0.0.1"}, "DeepSpeed, gloo or the store listens outside"
        job.send_signal(signal.SIGTERM)
        code = job.wait(timeout=60)
    told = log.read_text()
    assert code == 3, told
    assert told.count("checkpoint saved in") == 1 and "Traceback" not in told
    saved = max(int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-*"))
    assert saved == steps_done(out) >= 4, "the checkpoint is of the last step that was taken"
    with running(launcher("cpu-2", path), log) as job:
        assert job.wait(timeout=120) == 0, log.read_text()
    assert_same(out)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_without_a_hand(
    recipe: tuple[Path, Path], assert_same: Callable[[Path], None], tmp_path: Path
) -> None:
    path, out = recipe
    log = tmp_path / "log"
    with running(launcher("cpu-2-zero1", path, "--max-restarts", "2"), log) as job:
        wait_for_step(job, out, 5, log)
        rank_process(job, 1).send_signal(signal.SIGKILL)
        assert job.wait(timeout=150) == 0, log.read_text()
    assert [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == "resume"]
    assert_same(out)


@pytest.mark.slow
def test_a_frozen_rank_is_noticed_by_the_other(
    recipe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process keeps its connections open, as a machine without power or network does."""
    path, out = recipe
    log = tmp_path / "log"
    monkeypatch.setenv("PEFTUNE_LOST_AFTER", "6")
    with running(launcher("cpu-2", path), log) as job:
        wait_for_step(job, out, 3, log)
        rank_process(job, 1).send_signal(signal.SIGSTOP)
        code = job.wait(timeout=90)
    assert code == 1, log.read_text()
    assert "rank 0 has not heard of rank 1 for 6 s" in log.read_text()


@pytest.mark.slow
def test_bad_input_is_told_once_and_not_by_every_rank(recipe: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = recipe
    for change, wanted in (("data", {"train": str(tmp_path / "absent.txt")}), ("lora", {"rank": 4, "rnak": 5})):
        made = yaml.safe_load(path.read_text()) | {change: wanted}
        bad = tmp_path / "bad.yaml"
        bad.write_text(json.dumps(made))
        log = tmp_path / "log"
        with running(launcher("cpu-2", bad), log) as job:
            assert job.wait(timeout=60) == 2, log.read_text()
        assert log.read_text().count("peftune: ") == 1 and "Traceback" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_plain_torchrun_gives_the_adapter_of_one_process(
    recipe: tuple[Path, Path], assert_same: Callable[[Path], None], tmp_path: Path, rendezvous: str
) -> None:
    path, out = recipe
    log = tmp_path / "log"
    with running(torchrun(rendezvous, path), log) as job:
        assert job.wait(timeout=120) == 0, log.read_text()
    assert "2 ranks, DDP" in log.read_text()
    assert_same(out)


@pytest.mark.slow
def test_a_rank_killed_under_plain_torchrun_ends_the_job_with_one_line_of_ours(
    recipe: tuple[Path, Path], tmp_path: Path
) -> None:
    path, out = recipe
    log = tmp_path / "log"
    with running(torchrun("static", path), log) as job:
        wait_for_step(job, out, 3, log)
        addresses = listening(job)
        addresses.pop(job.pid)  # torch's store is on all addresses, as the guide says
        assert set().union(*addresses.values()) == {"127.0.0.1"}
        rank_process(job, 1).send_signal(signal.SIGKILL)
        assert job.wait(timeout=60) == 1
    ours = [line for line in log.read_text().splitlines() if line.startswith("peftune: ")]
    assert len(ours) == 1 and "from the last checkpoint" in ours[0]


@pytest.mark.slow
def test_plain_accelerate_shows_our_line_last_under_its_own_traceback(
    recipe: tuple[Path, Path], tmp_path: Path
) -> None:
    path, _ = recipe
    config = ROOT / "accelerate_configs" / "cpu-2.yaml"
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "peftune", "train"]
    log = tmp_path / "log"
    with running([*start, str(path), "data.train=absent.txt"], log) as job:
        assert job.wait(timeout=120) == 1
    *_, last, line = log.read_text().strip().splitlines()
    assert "peftune: absent.txt" in last and set(line) == {"="}, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "code", "line"),
    [
        (
            {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
            1,
            "3 ranks have not found each other at 127.0.0.1",
        ),
        ({}, 2, "WORLD_SIZE=3 RANK= LOCAL_RANK= MASTER_ADDR= MASTER_PORT="),
        ({"RANK": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, 2, "expected a RANK below WORLD_SIZE"),
        ({"PEFTUNE_LOST_AFTER": "soon", "WORLD_SIZE": "1"}, 2, "PEFTUNE_LOST_AFTER is 'soon'; expected seconds"),
    ],
)
def test_ranks_that_are_not_there_are_told_of_in_one_line(
    recipe: tuple[Path, Path], told: dict[str, str], code: int, line: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    given = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "3", "PEFTUNE_LOST_AFTER": "2"} | told
    given |= {"MASTER_PORT": port} if "RANK" in told else {}
    started = launcher("one", recipe[0])
    done = subprocess.run(started, env=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert [line in said for said in done.stderr.splitlines()] == [True], done.stderr


def test_by_default_a_lost_rank_is_told_of_within_a_minute() -> None:
    """Silence, and a heartbeat and a look that may have come just before."""
    from peftune.training.distributed.watchdog import lost_after

    assert lost_after() * (1 + 2 / 12) < 60
