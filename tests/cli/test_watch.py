"""The verb `watch`: one run, or many on one screen, that go on, end, fail or are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from recorded_runs import Make, events_of, lines_of
from rich.cells import cell_len

from peftune.cli import main, report
from peftune.cli.output.fleet_screen import screen_of
from peftune.console import SafeConsole
from peftune.errors import UserError
from peftune.training.report import recorded
from peftune.training.report.recorded import RunReader, read_run


def test_watch_tells_a_run_line_by_line_until_it_ends(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make("a", events_of(20, ended=False)) / "metrics.jsonl"
    timer = threading.Timer(1.5, lambda: path.write_text(lines_of(events_of())))
    timer.start()
    assert main.run(["watch", "a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warning at step 20: a spike, loss 9.000"
    assert lines[1].startswith(
        "a: in progress, step 20 of 40, loss 3.0000, validation poems 3.5000, validation code 3.5000"
    )
    assert lines[1].endswith("about 0:00:40 left for the steps")
    assert lines[-1].startswith("a: ended after step 40, loss 2.0000")


def test_watch_waits_for_a_run_that_loads_and_sees_one_that_was_killed(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a").mkdir()
    lock = FileLock("a/.lock", thread_local=False)  # let go by another thread

    def train() -> None:
        metrics = Path("a/metrics.jsonl")
        metrics.write_text(lines_of(events_of(20, ended=False)))
        os.utime(metrics, (1, 1))  # nothing has come for long: now the lock tells
        time.sleep(1.5)
        lock.release(force=True)

    lock.acquire()
    timer = threading.Timer(1.5, train)
    timer.start()
    assert main.run(["watch", "a"]) == 0
    timer.join()
    out = capsys.readouterr().out
    assert "a: is being loaded\n" in out and "a: in progress, step 20 of 40" in out
    assert out.splitlines()[-1].startswith("a: stopped, step 20 of 40")


def test_ctrl_c_ends_a_watch_on_a_terminal(make: Make) -> None:
    pty = pytest.importorskip("pty")
    make("a", events_of(20, ended=False))
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    program = [sys.executable, "-m", "peftune", "watch", "a"]
    process = subprocess.Popen(program, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while b"a spike" not in shown:
        shown += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "a: in progress, step 20 of 40" in text and "█" in text and "━" in text


def failed_at(step: int) -> list[dict[str, Any]]:
    return [*events_of(step, ended=False), {"event": "failed", "step": step, "text": "the loss is not finite"}]


def lines_on_screen(runs: list[recorded.RecordedRun], width: int = 80) -> list[str]:
    """Of a terminal of 24 lines, the last of which is the cursor's."""
    console = SafeConsole(width=width, height=24, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(screen_of(runs, width, 23))
    return captured.get().splitlines()


def test_many_runs_are_rows_of_one_screen(make: Make) -> None:
    make("poems", events_of(20, ended=False))
    make("code", failed_at(30))
    make("news"), make("law", events_of(30))
    os.utime(make("songs", events_of(20, ended=False)) / "metrics.jsonl", (1, 1))
    runs = RunReader([Path(name) for name in ("poems", "code", "news", "law", "songs")]).read()
    title, head, *rows = lines_on_screen(runs)
    assert title.strip() == "5 runs: 1 running, 1 failed, 1 finished, 1 stopped early, 1 stopped"
    assert head.split() == ["run", "step", "loss", "valid.", "change", "rate", "tok/s", "eta", "curve", "state"]
    figures = ["20/40", "3.025", "3.500", "+0.000", "1.0e-3", "50", "0m40"]
    cells = rows[0].split()
    assert cells[0] == "poems" and cells[2:9] == figures and cells[9][0] == "█" and cells[9][-1] == "▁"
    states = [row.split()[-2:] for row in rows[:5]]
    assert states == [["running", "!"], ["failed", "!"], ["finished", "!"], ["early", "!"], ["stopped", "!"]]
    assert rows[5].strip() == "… and warnings of 2 more"
    assert rows[6].strip() == "code: failed at step 30: the loss is not finite"  # before mere warnings
    assert rows[7].strip() == "poems: warning at step 20: a spike, loss 9.000" and len(rows) == 9


@pytest.mark.parametrize("width", [50, 80, 200])
def test_what_does_not_fit_on_the_screen_is_counted(make: Make, width: int) -> None:
    quiet = [event for event in events_of() if event["event"] != "warning"]
    for number in range(64):
        name = f"rank={2 ** (number % 8)},lr={number // 8 + 1}e-4,诗\n{number}"
        make(name, events_of(20, ended=False) if number % 8 == 7 else failed_at(30) if number == 60 else quiet)
    lines = lines_on_screen(RunReader([Path()]).read(), width)
    assert len(lines) == 23 and all(cell_len(line) <= width for line in lines)
    assert lines[0].strip() == "64 runs: 55 finished, 1 failed, 8 running"
    rows = lines[2:19]
    assert sum("running" in row for row in rows) == 8 and sum("failed" in row for row in rows) == 1
    assert lines[19].startswith("… and 47 more runs: 47 finished; warnings of 6 m")
    assert "failed at step 30" in lines[20]
    names = [row.split()[0] for row in rows]
    assert len(set(names)) == 17 if width > 50 else "…" in names[0]


def test_a_look_reads_only_what_came_since_the_look_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parsed = make("a", events_of(20, ended=False)) / "metrics.jsonl", list[int]()
    events_in, reader = recorded.events_in, RunReader([Path("a")])

    def counted(content: bytes) -> list[dict[str, Any]]:
        parsed.append(len(content))
        return events_in(content)

    monkeypatch.setattr(recorded, "events_in", counted)
    whole, later = path.read_bytes(), lines_of(events_of(40)[-60:]).encode()
    torn, cut = later[:-7], whole[: whole.rfind(b"{")]
    for content, read in (
        (whole, len(whole)),
        (whole, 0),
        (whole + torn, len(torn)),
        (whole + later, len(later) - torn.rfind(b"\n") - 1),
        (whole + later + b"{}\n{}\n", 6),
        (whole + later + b"{}\n{}\n{}\n", 9),
        (cut + later + later, len(cut + later + later)),  # it went on from a checkpoint
        (later, len(later)),
    ):
        path.write_bytes(content)
        found = reader.read()[0]
        assert parsed.pop() == read
        fresh = read_run(Path("a"))
        assert (found.events, found.problems) == (fresh.events, fresh.problems)


def test_a_directory_of_runs_stands_for_all_of_them(make: Make) -> None:
    Path("fleet/notes").mkdir(parents=True)
    make("fleet/trial-10"), make("fleet/trial-9"), make("trial-9")
    reader = RunReader([Path("fleet"), Path("trial-9"), Path("fleet/trial-10")])
    assert [run.name for run in reader.read()] == ["fleet/trial-9", "trial-10", "trial-9"]
    make("fleet/trial-11", events_of(20, ended=False))  # the next of the fleet begins
    Path("trial-9/metrics.jsonl").unlink()
    runs = reader.read()
    assert [run.name for run in runs] == ["fleet/trial-9", "trial-10", "trial-11", "trial-9"]
    assert [bool(run.problems) for run in runs] == [False, False, False, True]
    assert runs[-1].problems[0].startswith("trial-9: no run is there, expected")
    with pytest.raises(UserError, match="notes: no run is there"):
        RunReader([Path("fleet"), Path("fleet/notes")]).read()


@pytest.mark.parametrize("terminal", [False, True])
def test_watch_of_a_directory_shows_every_run_until_all_end(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(report, "_LEAST", 0.1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    make("fleet/code"), make("fleet/poems", events_of(20, ended=False))

    def end() -> None:
        with open("fleet/poems/metrics.jsonl", "a") as metrics:
            metrics.write(lines_of(events_of()[-30:]))

    timer = threading.Timer(0.5, end)
    timer.start()
    assert main.run(["watch", "fleet"]) == 0
    timer.join()
    lines = capsys.readouterr().out.splitlines()
    if terminal:
        assert any("1 finished, 1 running" in line for line in lines) and any("2 finished" in line for line in lines)
        return
    assert lines[0] == "code: warning at step 40: a spike, loss 9.000"
    assert lines[1].startswith("code: ended after step 40, loss 2.0000") and lines[2].startswith("poems: warning at")
    assert lines[3].startswith("poems: in progress, step 20 of 40, loss 3.0000")
    assert lines[4].startswith("poems: warning at step 40") and lines[5].startswith("poems: ended after step 40")
    assert len(lines) == 6
