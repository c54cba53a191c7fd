"""A launched run ends with its ranks' own exit code, in one line or none, and saves when it is told to stop."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

LOCAL = ["bash", str(Path(__file__).parents[2] / "launch" / "local.sh")]
Start = Callable[..., subprocess.Popen[str]]


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """Exit code and what stood on stderr, without what gloo itself says there and the tracebacks of ranks."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, "\n".join(line for line in errors.splitlines() if line.startswith("peftune:"))


def wait_for_ranks(process: subprocess.Popen[str], count: int) -> None:
    """Until that many ranks have met: each says so in one line."""
    assert process.stdout is not None
    for _ in range(count):
        assert re.match(r"rank \d of \d", process.stdout.readline())


def imports_torch(process: subprocess.Popen[str]) -> bool:
    """Whether the launcher has come so far; its own answer to signals is ready then."""
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.slow
def test_a_code_that_a_rank_has_explained_is_passed_on_without_a_word_or_a_restart(start: Start) -> None:
    process = start([*LOCAL, "cpu-2", "recipe", "exit=1:4", "seconds=20"], MAX_RESTARTS="2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "peftune:" not in errors and "ChildFailedError" not in errors


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_within_a_minute_and_is_named(start: Start) -> None:
    process = start([*LOCAL, "cpu-2", "recipe", "kill=1", "seconds=120"])
    wait_for_ranks(process, 2)
    code, line = finish(process, 60)
    assert code == 1
    assert re.fullmatch(r"peftune: rank 1 on \S+ was killed by SIGKILL .*start the same command again.*", line)


@pytest.mark.slow
def test_ctrl_c_lets_every_rank_save_and_ends_with_3(start: Start) -> None:
    process = start([*LOCAL, "cpu-2", "recipe", "seconds=60", "save=1"])
    wait_for_ranks(process, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # impatience, or a scheduler that sends it twice, changes nothing
    assert finish(process) == (3, "")


@pytest.mark.slow
def test_ranks_that_do_not_save_in_time_are_ended_and_the_line_says_how_to_give_more(start: Start) -> None:
    process = start([*LOCAL, "cpu-2", "recipe", "seconds=60", "save=30"], PEFTUNE_GRACE="1")
    wait_for_ranks(process, 2)
    process.terminate()
    code, line = finish(process, 20)
    assert code == 1 and "1 s after SIGTERM" in line and "PEFTUNE_GRACE" in line


def test_one_process_takes_signals_itself_and_keeps_its_code(start: Start) -> None:
    process = start([*LOCAL, "cpu", "recipe", "seconds=60"])
    wait_for_ranks(process, 1)
    process.terminate()
    assert finish(process) == (3, "")


def test_a_deepspeed_layout_is_found_from_another_directory(start: Start) -> None:
    assert finish(start([*LOCAL, "cpu-2-zero3", "recipe"])) == (0, "")


def test_a_signal_before_the_ranks_exist_ends_with_3(start: Start) -> None:
    process = start([*LOCAL, "cpu-2", "recipe"])
    while not imports_torch(process):
        time.sleep(0.01)
    process.terminate()  # while the launcher imports torch
    code, line = finish(process)
    assert code == 3 and "before any rank had started" in line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_ranks_import_is_one_line(
    start: Start, environment: dict[str, str], tmp_path: Path, number: int
) -> None:
    """Ranks of `peftune train` itself; the first of them says it, and the launcher's code is that of a stop."""
    (tmp_path / "recipe.yaml").write_text("{base: builtin:small, data: {train: absent.txt}, run: {out: out}}")
    environment.pop("PEFTUNE_RANK_PROGRAM")
    process = start([*LOCAL, "cpu-2", "recipe.yaml"])
    launcher = psutil.Process(process.pid)
    while len(ranks := [rank for rank in launcher.children() if rank.is_running()]) < 2 or not all(
        "libtorch" in Path(f"/proc/{rank.pid}/maps").read_text() for rank in ranks
    ):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    began = time.monotonic()
    code, line = finish(process)
    assert time.monotonic() - began < 8  # two levels of five seconds at most, on a busy machine
    assert code == 3 and line.startswith("peftune: stopped by SIGTERM") and "\n" not in line
