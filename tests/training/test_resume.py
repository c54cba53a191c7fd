"""A run that is cut anywhere goes on with the same command and ends with the same adapter, bit for bit."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

from peftune.config.recipe import Recipe
from peftune.errors import Interrupted, UserError
from peftune.training import checkpoint, run, step
from peftune.training.metrics import read_metrics
from peftune.training.run import train
from peftune.training.run_directory import is_being_written, sole_writer

Make = Callable[..., Recipe]
Cut = Callable[[Recipe], Path]
KILLS = int(os.environ.get("PEFTUNE_TEST_KILLS", "4"))  # each costs the start-up of a process
TRAINED_WITH_NOISE = ("lora.dropout=0.1", "optim.neftune=5", "optim.steps=12", "run.save_every=1")


def fingerprint(out: Path) -> str:
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_run_resumed_after_every_possible_stop_equals_one_without_stops(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = recipe(
        *TRAINED_WITH_NOISE, "data.validation=0.2", "run.eval_every=3", f"run.out={tmp_path / 'a' / 'x'}"
    )
    train(undisturbed)
    disturbed = recipe(
        *TRAINED_WITH_NOISE, "data.validation=0.2", "run.eval_every=3", f"run.out={tmp_path / 'b' / 'x'}"
    )

    def stop_after_one_step(*given: Any) -> step.StepResult:
        monkeypatch.setattr(run, "train_step", refuse)
        return step.train_step(*given)

    def refuse(*_: object) -> object:
        raise step.StopNow

    promised: list[int] = []
    for _ in range(12):
        monkeypatch.setattr(run, "train_step", stop_after_one_step)
        if (tmp_path / "b" / "x" / "adapter_config.json").exists():
            break
        try:
            train(disturbed)
        except Interrupted as error:
            assert "the same command goes on" in str(error)
            promised.append(int(str(error).split("after step ")[1].split()[0]))
    monkeypatch.undo()
    train(disturbed)
    a, b = tmp_path / "a" / "x", tmp_path / "b" / "x"
    assert fingerprint(a) == fingerprint(b)
    assert (a / "loss.png").read_bytes() == (b / "loss.png").read_bytes()
    assert [e["from_step"] for e in read_metrics(b / "metrics.jsonl") if e["event"] == "resume"] == promised

    def recorded(out: Path) -> list[tuple[object, ...]]:
        events = read_metrics(out / "metrics.jsonl")
        return [(e["event"], e["step"], e["loss"]) for e in events if e["event"] in ("train", "eval")]

    assert recorded(a) == recorded(b)


def command_line(made: Recipe, tmp_path: Path) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")), encoding="utf-8")
    return [sys.executable, "-m", "peftune", "train", str(path)]


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_no_bit(recipe: Make, tmp_path: Path) -> None:
    settings = (*TRAINED_WITH_NOISE, f"optim.steps={15 * KILLS}")
    train(recipe(*settings, f"run.out={tmp_path / 'undisturbed'}"))
    out = tmp_path / "killed"
    command = command_line(recipe(*settings, f"run.out={out}"), tmp_path)
    chance, kills = random.Random(7), 0
    for _ in range(2 * KILLS + 20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seen = {path.name for path in (out / "checkpoints").glob("step-*")}
        while kills < KILLS and process.poll() is None:
            now = {path.name for path in (out / "checkpoints").glob("step-*")}
            if now - seen:
                time.sleep(chance.random() * 0.05)  # of one to a few steps, each with its checkpoint
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        _, stderr = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, stderr
    assert kills == KILLS
    assert fingerprint(out) == fingerprint(tmp_path / "undisturbed")


@pytest.mark.slow
def test_sigterm_saves_says_so_and_exits_with_3(recipe: Make, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    made = recipe("optim.steps=100000", "data.validation=0.2", "run.eval_every=10", f"run.out={out}")
    process = subprocess.Popen(command_line(made, tmp_path), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and '"event": "train"' not in (
        (out / "metrics.jsonl").read_text() if out.exists() and (out / "metrics.jsonl").exists() else ""
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    assert "SIGTERM" in stderr and "checkpoint saved" in stderr and "Traceback" not in stderr
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None and found.state.step > 0


def test_a_checkpoint_is_small_and_holds_no_base_weights(recipe: Make, tmp_path: Path) -> None:
    train(recipe("run.save_every=2", f"run.out={tmp_path / 'a'}"))
    saved = checkpoint.newest(tmp_path / "a" / "checkpoints")
    assert saved is not None
    trainable = 4 * sum(value.numel() for value in saved.values.values())
    files = (tmp_path / "a" / "checkpoints" / f"step-{saved.state.step}").iterdir()
    assert sum(path.stat().st_size for path in files) < 4 * trainable + 1_000_000
    assert all(".lora_" in name for name in saved.values)


def small_checkpoint(step: int, best_step: int | None = None) -> checkpoint.Checkpoint:
    moments = {"p/step": torch.tensor(float(step)), "p/exp_avg": torch.ones(2), "p/exp_avg_sq": torch.ones(2)}
    return checkpoint.Checkpoint(checkpoint.State(step=step, best_step=best_step), {"p": torch.ones(2)}, moments)


def test_only_the_newest_two_and_the_best_checkpoint_stay(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    for number in range(1, 6):
        checkpoint.save(tmp_path, small_checkpoint(step=number, best_step=2))
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["step-2", "step-4", "step-5"]


def test_a_full_disk_is_one_clear_error_and_the_checkpoint_before_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, small_checkpoint(step=1))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "flush_to_disk", full)
    with pytest.raises(UserError, match="the disk is full; earlier checkpoints are intact"):
        checkpoint.save(tmp_path, small_checkpoint(step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state.step == 1


def test_a_full_disk_under_the_records_is_one_clear_error(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftune.training.metrics import MetricsLog

    made = recipe("run.save_every=1")
    write = MetricsLog.write

    def full_at_the_third_step(self: MetricsLog, event: str, **values: Any) -> None:
        if event == "train" and values["step"] == 3:
            assert self.file is not None
            self.file.close()
            self.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  the run closes it
        write(self, event, **values)

    monkeypatch.setattr(MetricsLog, "write", full_at_the_third_step)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # /dev/full cannot be flushed
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left.*checkpoints are intact"):
        train(made)
    found = checkpoint.newest(Path(made.run.out) / "checkpoints")
    assert found is not None and found.state.step == 2


@pytest.mark.parametrize("broken", ["adapter.safetensors", "moments.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, broken: str) -> None:
    for number in (1, 2):
        checkpoint.save(tmp_path, small_checkpoint(step=number))
    path = tmp_path / "step-2" / broken
    path.write_bytes(path.read_bytes()[:7])
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state.step == 1


def test_another_recipe_is_refused_with_the_differences(recipe: Make) -> None:
    train(recipe("run.save_every=1"))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.01, is 0\.5.*run\.out another name"):
        train(recipe("optim.lr=0.5"))


def test_harmless_changes_resume(recipe: Make, train_without_delivery: Cut, tmp_path: Path) -> None:
    train_without_delivery(recipe("run.save_every=1"))
    assert train(recipe("run.save_every=5", "run.eval_every=2", "batch.micro_size=3")).step == 3


def test_never_refuses_where_a_checkpoint_or_a_finished_run_is(recipe: Make, train_without_delivery: Cut) -> None:
    train_without_delivery(recipe("run.save_every=1"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"run\.resume is never"):
            train(recipe("run.resume=never"))
        train(recipe())


def test_a_changed_recipe_is_told_by_the_values_that_differ(recipe: Make, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the cat sat")
    (texts / "b.txt").write_text("on a mat")
    source = f"data.train=[{{path: {texts}}}]"
    train(recipe(source, "optim.steps=1"))
    (texts / "b.txt").unlink()
    (texts / "a.txt").write_text("the cat ran")
    (texts / "c.txt").write_text("one dog ran to my log")
    with pytest.raises(UserError) as error:
        train(recipe(source, "optim.steps=1"))
    told = f" (added: {texts / 'c.txt'}, removed: {texts / 'b.txt'})"
    assert "fingerprint of data train was " in str(error.value) and told in str(error.value)
    assert "to go on with that one, undo the change" in str(error.value)
    (texts / "c.txt").unlink()
    (texts / "b.txt").write_text("on a log")
    with pytest.raises(UserError, match="the same files with the same sizes, with other text"):
        train(recipe(source, "optim.steps=1"))
    (texts / "b.txt").write_text("on a long log")
    with pytest.raises(UserError, match=f"changed: {texts / 'b.txt'}"):
        train(recipe(source, "optim.steps=1"))
    with pytest.raises(UserError) as error:
        train(recipe(f"data.train=[{{path: {texts}/*.txt, text: null}}]", "optim.steps=1"))
    assert "data.train[0].path was …" in str(error.value) and "data.train[0].text" not in str(error.value)
    assert f"was …{str(texts)[-12:]}, is …{str(texts)[-12:]}/*.txt" in str(error.value)


def test_two_runs_cannot_write_one_directory(recipe: Make, tmp_path: Path) -> None:
    from peftune.training.distributed import start

    accelerator = start.start([], str(tmp_path))
    with sole_writer(tmp_path / "adapter", accelerator), pytest.raises(UserError, match="another run is writing there"):
        train(recipe())


def test_a_run_can_begin_while_somebody_looks_whether_one_goes_on(tmp_path: Path) -> None:
    """The look takes the lock for a moment."""
    from peftune.training.distributed import start

    accelerator, lock = start.start([], str(tmp_path)), FileLock(tmp_path / ".lock", thread_local=False)
    lock.acquire()
    look = threading.Timer(0.1, lock.release)
    look.start()
    with sole_writer(tmp_path, accelerator):
        assert is_being_written(tmp_path)
    look.join()
    assert not is_being_written(tmp_path)
