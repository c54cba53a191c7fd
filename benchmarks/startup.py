"""How soon something happens: a command's process from its start until it ends or says that its first step is done."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.options import Setup, target_modules
from benchmarks.harness.report import Result, compare, row
from benchmarks.harness.workers import Channel, Contestant

_PATIENCE = 600.0  # seconds until a command that reports no step is given up


def worker(job: dict[str, Any], channel: Channel) -> None:
    """One round starts the command once; the value is seconds until its first step, or its end where none is due."""
    channel.ready(
        settings={"command": " ".join(Path(part).name if part.startswith("/") else part for part in job["command"])}
    )
    log = Path(job["log"])
    for _ in channel.rounds():
        shutil.rmtree(job["out"], ignore_errors=True)
        start = time.perf_counter()
        with log.open("wb") as output:
            child = subprocess.Popen(job["command"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait(child, Path(job["watched"]), job["sign"], log)
            seconds = time.perf_counter() - start
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # the group that this process started
                child.wait()
        channel.answer(seconds)


def _wait(child: subprocess.Popen[bytes], watched: Path, sign: str | None, log: Path) -> None:
    """Until the command has written `sign`; without one, until it ends."""
    until, parent = time.monotonic() + _PATIENCE, os.getppid()
    while time.monotonic() < until and os.getppid() == parent:  # an interrupted benchmark leaves nobody training
        ended = child.poll() is not None  # before reading, so that the last words are read
        if sign and watched.is_file() and sign in watched.read_text(encoding="utf-8", errors="replace"):
            return
        if ended and not sign and not child.returncode:
            return
        if ended:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            reason = next((line for line in lines if "Error: " in line), " ".join(lines[-1:]))
            raise SystemExit(f"ended with {child.returncode}: {reason[:300]}")
        time.sleep(0.01)
    raise SystemExit(f"no step within {_PATIENCE:.0f} s, or interrupted")


def contestants(setup: Setup) -> list[Contestant]:
    """The three commands."""
    a, root = setup.arguments, setup.root
    recipe, data = root / "recipe.yaml", root / "data"
    values = setup.recipe("peftune", batch={"global_size": a.documents})
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    data.mkdir(exist_ok=True)
    shutil.copy(setup.documents, data / "train.jsonl")
    modules = target_modules(a.targets)
    if len(modules) == 1:  # a single name is a regular expression over full paths on TRL's command line
        modules = [rf".*\.{modules[0]}"]
    trl = [
        str(Path(sys.executable).with_name("trl")), "sft", "--model_name_or_path", str(setup.base),
        "--dataset_name", str(data), "--output_dir", str(root / "out-trl"), "--use_peft", "--lora_r", str(a.rank),
        "--lora_target_modules", *modules, "--per_device_train_batch_size", str(a.documents),
        "--max_steps", "1000", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none",
        "--disable_tqdm", "true", *(["--use_cpu", "true"] if a.device == "cpu" else []), *shlex.split(a.trl),
    ]  # fmt: skip
    peftune = [sys.executable, "-m", "peftune"]
    metrics = Path(values["run"]["out"]) / "metrics.jsonl"
    commands: dict[str, tuple[list[str], Path, str | None]] = {
        "peftune --help": ([*peftune, "--help"], root / "log-peftune", None),
        "peftune train, first step": ([*peftune, "train", str(recipe), *a.ours], metrics, '"event": "train"'),
        "trl sft, first step": (trl, root / "log-trl", "'loss'"),
    }
    made = []
    for name, (command, watched, sign) in commands.items():
        whose = name.split()[0]
        job = {"command": command, "watched": str(watched), "sign": sign}
        job |= {"log": str(root / f"log-{whose}"), "out": str(root / f"out-{whose}")}
        made.append(Contestant(name, "benchmarks.startup", job, "s", must_run=whose == "peftune"))
    return made


def first_step(setup: Setup) -> Result:
    """B13: how soon something happens: `peftune --help`, and the end of the first step of `train` and `trl sft`.

    python -m benchmarks.train startup [--shape small] [--documents 8]

    Both commands learn the same few documents, all of them in one step, with the same adapter on the same base; the
    clock runs from the start of the process until the step is reported (a line in metrics.jsonl, a line with the loss
    on TRL's output). The first start of a command, which fills caches, is a warm-up round.
    """
    everyone = contestants(setup)
    setup.interleave(everyone)
    help_, ours, trl = everyone
    result = Result("B13", "start-up", setup.settings()).add(everyone)
    result.rows = [
        row("B13 help", "peftune --help", "the clock", help_.values(), "s"),
        compare("B13 train", "first step of train", ours, trl, "trl sft"),
    ]
    return result
