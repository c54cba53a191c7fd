"""A launched run ends with its ranks' own exit code, in one line or none, and saves when it is told to stop."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCAL = ["bash", str(ROOT / "launch" / "local.sh")]


def start(arguments: list[str], environment: Mapping[str, str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LOCAL, *arguments], env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """Exit code and what stood on stderr, without what gloo itself says there and the tracebacks of ranks."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, "\n".join(line for line in errors.splitlines() if line.startswith("peftune:"))


def wait_for_ranks(process: subprocess.Popen[str], count: int) -> None:
    """Until that many ranks have met: each says so in one line."""
    assert process.stdout is not None
    for _ in range(count):
        assert re.match(r"rank \d of \d", process.stdout.readline())


@pytest.mark.slow
@pytest.mark.parametrize(("code", "rank"), [(2, 0), (4, 1)])
def test_a_code_that_a_rank_has_explained_is_passed_on_without_a_word_or_a_restart(
    code: int, rank: int, environment: dict[str, str], tmp_path: Path
) -> None:
    process = start(
        ["cpu-2", "recipe", f"exit={rank}:{code}", "seconds=20"], environment | {"MAX_RESTARTS": "2"}, tmp_path
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "peftune:" not in errors and "ChildFailedError" not in errors


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_within_a_minute_and_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    process = start(["cpu-2", "recipe", "kill=1", "seconds=120"], environment, tmp_path)
    wait_for_ranks(process, 2)
    code, line = finish(process, 60)
    assert code == 1
    assert re.fullmatch(r"peftune: rank 1 on \S+ was killed by SIGKILL .*start the same command again.*", line)


@pytest.mark.slow
def test_with_restarts_a_killed_rank_is_started_again_and_the_job_succeeds(
    environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(
        ["cpu-2", "recipe", "kill=1", "seconds=1", f"out={out}"], environment | {"MAX_RESTARTS": "1"}, tmp_path
    )
    code, line = finish(process)
    assert code == 0 and "restart 1 of 1" in line
    assert out.read_text() == "adapter of 2 ranks, trained on one machine\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_lets_every_rank_save_and_ends_with_3(
    number: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    process = start(["cpu-2", "recipe", "seconds=60", "save=1"], environment, tmp_path)
    wait_for_ranks(process, 2)
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # a scheduler may send it twice
    assert finish(process) == (3, "")


@pytest.mark.slow
def test_ranks_that_do_not_save_in_time_are_ended_and_the_line_says_how_to_give_more(
    environment: dict[str, str], tmp_path: Path
) -> None:
    process = start(["cpu-2", "recipe", "seconds=60", "save=30"], environment | {"PEFTUNE_GRACE": "1"}, tmp_path)
    wait_for_ranks(process, 2)
    process.terminate()
    code, line = finish(process, 20)
    assert code == 1 and "1 s after SIGTERM" in line and "PEFTUNE_GRACE" in line


def test_one_process_takes_signals_itself_and_keeps_its_code(environment: dict[str, str], tmp_path: Path) -> None:
    process = start(["cpu", "recipe", "seconds=60"], environment, tmp_path)
    wait_for_ranks(process, 1)
    process.terminate()
    assert finish(process) == (3, "")


def test_a_deepspeed_layout_is_found_from_another_directory(environment: dict[str, str], tmp_path: Path) -> None:
    process = start(["cpu-2-zero3", "recipe", "exit=0:4"], environment, tmp_path)
    assert finish(process) == (4, "")
