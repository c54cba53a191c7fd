"""What people read on stderr and in tables."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from peftune import console
from peftune.console import Console, change
from peftune.model.base import BUILTIN, open_base


@pytest.mark.parametrize(
    ("value", "base", "told"),
    [(30.0, 40.0, "-25 %"), (50.0, 40.0, "+25 %"), (399.0, 40.0, "+898 %"), (4000.0, 40.0, "100 times")],
)
def test_a_change_is_a_percentage_or_a_factor(value: float, base: float, told: str) -> None:
    assert change(value, base) == told


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_comes_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Console(clock=clock).progress as progress:
        task = progress.add_task("step", total=400, note="")
        for step in range(1, 101):
            clock.now = step
            progress.update(task, completed=step, note=f"loss {4 - step / 100:.2f}  lr 1.0e-04  900 tok/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"step {step} of 400, loss {4 - step / 100:.2f}, lr 1.0e-04, 900 tok/s, {left} left"
        for step, left in ((30, "0:06:10"), (60, "0:05:40"), (90, "0:05:10"))
    ]


def test_reading_and_other_work_tell_too_but_not_what_ends_soon(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Console(clock=clock).reading("tokenising", 80_000_000) as show:
        for clock.now in (1.0, 20.0, 40.0, 60.0):
            show(int(clock.now * 1e6), f"{clock.now:.0f} documents")
    with Console(clock=clock).progress as progress:
        task = progress.add_task("merging", total=3, note="")
        for clock.now in (65.0, 100.0, 200.0):
            progress.advance(task)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["tokenising 40 of 80 MB, 40 documents, 0:00:40 left", "merging 2 of 3, 0:00:35 left"]


def test_a_quiet_console_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "verbosity", "quiet")
    clock = Clock()
    quiet = Console(clock=clock)
    quiet.say("a notice")
    with quiet.progress as progress:
        task = progress.add_task("step", total=9, note="")
        clock.now = 100.0
        progress.advance(task)
    assert capsys.readouterr().err == ""


def test_members_of_a_fleet_speak_by_name_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    parent = Console(clock=clock)
    poems, news = parent.named("poems"), parent.named("[/news]")  # brackets are no markup
    assert poems.console is news.console is parent.console and poems.progress is news.progress is parent.progress
    poems.say("step 2/4")
    news.stage("evaluation")
    parent.say("all")
    with news.reading("tokenising", None) as show:
        clock.now = 40.0
        show(7_000_000, "9 documents")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["poems: step 2/4", "▸ [/news]: evaluation", "all", "[/news]: tokenising 7 MB, 9 documents"]
    Console(speaks=False).named("poems").say("on another rank")
    assert capsys.readouterr().err == ""


def test_names_with_brackets_stay_as_they_are_in_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = Console()
    assert shown.console.is_terminal
    shown.progress.add_task("evaluating [/news]", total=3, note="[red]loss")
    with shown.console.capture() as captured:
        shown.console.print(shown.progress.get_renderable())
    assert "evaluating [/news]" in captured.get() and "[red]loss" in captured.get()


def test_a_download_says_that_it_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr(console, "_LINE_EVERY", 0.01)

    def download(*_: object, **__: object) -> str:
        deadline, said = time.monotonic() + 60, ""
        while "so far" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().err
        assert said.startswith("downloading me/poems: 0:00:0")
        return str(shutil.copytree(BUILTIN["builtin:small"], tmp_path / "copy"))

    files = [{"rfilename": "model.safetensors"}]
    found = huggingface_hub.ModelInfo(id="me/poems", siblings=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: found)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_base("me/poems").directory == tmp_path / "copy"
