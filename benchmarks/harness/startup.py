"""How soon something happens: a command's process from its start until it ends or says that its first step is done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.options import Setup, target_modules
from benchmarks.harness.report import Result, compare, row, spread
from benchmarks.harness.workers import Channel, Contestant, interleave

_PATIENCE = 600.0  # seconds until a command that reports no step is given up
OPTIONS: dict[str, dict[str, Any]] = {
    "trl": {"type": json.loads, "default": [], "metavar": "JSON", "help": "more arguments for trl sft, as a list"},
}


def worker(job: dict[str, Any], channel: Channel) -> None:
    """One round starts the command once; the value is seconds."""
    channel.ready(
        settings={"command": " ".join(Path(part).name if part.startswith("/") else part for part in job["command"])}
    )
    for _ in channel.rounds():
        shutil.rmtree(job["out"], ignore_errors=True)
        channel.answer(_seconds(job))


def _seconds(job: dict[str, Any]) -> float:
    """Until the command ends, or until its first step is reported; then it is ended."""
    log = Path(job["log"])
    with open(log, "wb") as output:
        start = time.perf_counter()
        child = subprocess.Popen(job["command"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if job["watch"] is None:
                child.wait(timeout=_PATIENCE)
            else:
                _wait_for_step(child, Path(job["watch"]), job["sign"], log)
            seconds = time.perf_counter() - start
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # the group that this process started
                child.wait()
    if job["watch"] is None and child.returncode:
        raise SystemExit(f"ended with {child.returncode}: {_last_words(log)}")
    return seconds


def _wait_for_step(child: subprocess.Popen[bytes], watched: Path, sign: str, log: Path) -> None:
    until, parent = time.monotonic() + _PATIENCE, os.getppid()
    while time.monotonic() < until and os.getppid() == parent:  # an interrupted benchmark leaves nobody training
        ended = child.poll() is not None  # before reading, so that the last words are read
        if watched.is_file() and sign in watched.read_text(encoding="utf-8", errors="replace"):
            return
        if ended:
            raise SystemExit(f"no step: ended with {child.returncode}: {_last_words(log)}")
        time.sleep(0.01)
    raise SystemExit(f"no step within {_PATIENCE:.0f} s, or interrupted")


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "Error: " in line), " ".join(lines[-1:]))[:300]


def _modules(targets: str) -> list[str]:
    """For TRL's command line, which takes a single name for a regular expression over full paths."""
    names = target_modules(targets)
    return names if len(names) > 1 else [rf".*\.{names[0]}"]


def contestants(setup: Setup) -> list[Contestant]:
    """The three commands."""
    a, root = setup.arguments, setup.root
    recipe = root / "recipe.yaml"
    values = setup.recipe(batch={"global_size": a.documents})
    values["run"]["out"] = str(root / "out-peftune")
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    data = root / "data"
    data.mkdir(exist_ok=True)
    shutil.copy(setup.documents, data / "train.jsonl")
    trl = [
        str(Path(sys.executable).with_name("trl")), "sft", "--model_name_or_path", str(setup.base),
        "--dataset_name", str(data), "--output_dir", str(root / "out-trl"), "--use_peft", "--lora_r", str(a.rank),
        "--lora_target_modules", *_modules(a.targets), "--per_device_train_batch_size", str(a.documents),
        "--max_steps", "1000", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none",
        "--disable_tqdm", "true", *(["--use_cpu", "true"] if a.device == "cpu" else []), *a.trl,
    ]  # fmt: skip
    peftune = [sys.executable, "-m", "peftune"]
    metrics = root / "out-peftune" / "metrics.jsonl"
    commands = {
        "peftune --help": ([*peftune, "--help"], None, ""),
        "peftune train, first step": ([*peftune, "train", str(recipe), *a.ours], metrics, '"event": "train"'),
        "trl sft, first step": (trl, root / "log-2", "'loss'"),
    }
    made = []
    for i, (name, (command, watch, sign)) in enumerate(commands.items()):
        job = {
            "command": command, "watch": None if watch is None else str(watch), "sign": sign,
            "log": str(root / f"log-{i}"), "out": str(root / ("out-trl" if "trl" in name else "out-peftune")),
        }  # fmt: skip
        made.append(Contestant(name, "benchmarks.harness.startup", job, "s", must_run="trl" not in name))
    return made


def first_step(setup: Setup) -> Result:
    """B13: how soon something happens: `peftune --help`, and the end of the first step of `train` and `trl sft`.

    python -m benchmarks.train startup [--shape small] [--documents 8]

    Both commands learn the same few documents, all of them in one step, with the same adapter on the same base; the
    clock runs from the start of the process until the step is reported (a line in metrics.jsonl, a line with the loss
    on TRL's output). The first start of a command, which fills caches, is a warm-up round.
    """
    everyone = contestants(setup)
    environment = {**setup.environment(), "PYTHONUNBUFFERED": "1"}
    interleave(everyone, setup.arguments.rounds, setup.arguments.warmup, environment)
    help_, ours, trl = everyone
    result = Result("B13", "start-up", setup.settings()).add(everyone)
    result.rows = [
        row("B13 help", "peftune --help", "the clock", spread(help_.values()), "s"),
        compare("B13 train", "first step of train", ours, trl, "trl sft"),
    ]
    return result
