"""What a run leaves for machines to read: `metrics.jsonl`, one object a line, and experiment trackers."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from peftune.errors import Interrupted, PeftuneError, UserError, explained
from peftune.files import parse_json, read_bytes
from peftune.training.checkpoint import State, free_name
from peftune.training.distributed.agreement import flatten

_START = b'{"event": "start"'  # how every file of ours begins
_NUMBERS = {"train": ("step", "loss"), "eval": ("step", "loss", "perplexity", "bits_per_byte", "tokens")}


class MetricsLog:
    """Appends events on the main process; other ranks call the same methods and write nothing.

    A resumed run cuts off what the checkpoint did not know, so that it does not repeat itself. Where the file is not
    what the checkpoint knew, it is kept under another name, a new one begins, and `lost` says so. UserError where it
    cannot be read or written.
    """

    def __init__(self, path: Path, accelerator: Accelerator, recipe: dict[str, Any], state: State) -> None:
        self.accelerator = accelerator
        self.path = path
        self.file: FileIO | None = None
        self.lost = ""
        self.defers = False
        self.broken: UserError | None = None
        """Whether what fails in writing is kept as `broken`, where all ranks can agree on it, and not raised."""
        self.digest = hashlib.sha256()
        if accelerator.is_main_process:
            with explained(f"{path}: cannot be written"):
                self._open(state)
        if recipe["run"]["track"]:
            accelerator.init_trackers("peftune", config={key: str(value) for key, value in flatten(recipe).items()})

    def _open(self, state: State) -> None:
        exists = os.path.lexists(self.path)
        if exists and (self.path.is_symlink() or not self.path.is_file()):
            raise OSError("it is not a file")
        kept = b""
        if exists and state.records_bytes:
            with self.path.open("rb") as file:
                kept = file.read(state.records_bytes)
        digest = hashlib.sha256(kept)
        same = len(kept) == state.records_bytes and state.records_sha256 in (None, digest.hexdigest())
        if exists and not state.records_bytes:  # nothing of it is gone on with, but it may be of another program
            with self.path.open("rb") as file:
                same = _START.startswith(file.read(len(_START)))
        if not same:
            self.lost = f"{self.path} is not what the checkpoint of step {state.step} knew"
            if exists:
                self.path.rename(aside := free_name(self.path, "damaged"))
                self.lost += f" and is kept as {aside.name}"
            state.records_from = state.step
            self.lost += f": the metrics begin anew at step {state.step}"
            kept, digest, exists = b"", hashlib.sha256(), False
        self.file = open(self.path, "r+b" if exists else "x+b", buffering=0)  # noqa: SIM115  closed in close()
        self.file.truncate(len(kept))
        self.file.seek(0, os.SEEK_END)
        self.digest = digest

    def write(self, event: str, **values: Any) -> None:
        """Append one event; numbers that JSON cannot hold become null."""
        if self.file is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            line = json.dumps({"event": event, **finite}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            self._append(line)
        if self.accelerator.log_with and "step" in values:
            prefix = f"{event}/{values['domain']}" if "domain" in values else event
            logged = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(logged, step=values["step"])

    def _append(self, line: bytes) -> None:
        if self.file is None or self.broken is not None:
            return
        reason = "the disk is full"
        try:
            if self.file.write(line) == len(line):
                self.digest.update(line)
                return
        except OSError as error:
            reason = f"cannot be written: {error.strerror}"
        failure = UserError(f"{self.path}: {reason}; checkpoints are intact")
        if not self.defers:
            raise failure
        self.broken = failure

    def flush(self, state: State) -> None:
        """Wait until all is on the disk, and note in the state how much and what that is; UserError where it fails."""
        if self.broken is not None:
            raise self.broken
        if self.file is None:
            return
        with explained(f"{self.path}: cannot be written", "; checkpoints are intact"):
            os.fsync(self.file.fileno())
        state.records_bytes, state.records_sha256 = self.file.tell(), self.digest.hexdigest()

    def events(self) -> list[dict[str, Any]]:
        """All events so far; where somebody changed the file meanwhile, what is left of them, and `lost` says so."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            self.lost = f"{self.path}: cannot be read: {error.strerror or error}: the plot is empty"
            return []
        if hashlib.sha256(content).digest() != self.digest.digest():
            self.lost = f"{self.path} was changed while the run wrote it: the plot shows what is left"
        return events_in(content)

    def note_failure(self, error: PeftuneError, step: int) -> None:
        """Record why the run failed, as the last event, if the disk takes it; a run that was interrupted goes on."""
        if not isinstance(error, Interrupted):
            with suppress(UserError):
                self.write("failed", step=step, text=str(error) or "another rank failed")

    def close(self) -> None:
        """End the file and the trackers."""
        if self.file is not None:
            self.file.close()
        if self.accelerator.log_with:
            self.accelerator.end_training()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The events of a run, from its directory or its metrics.jsonl, also while it goes on: one mapping for each.

    `event` says what it is: "start", "train" (`loss` in nats per token, `lr`, `tokens` so far, `tokens_per_second`),
    "eval" (also `domain`, `perplexity`, `bits_per_byte`), "sample", "warning", "failed" (`text` says why), …; most
    have `step`. Events end at a line that is none: the last may have been cut short by a crash. UserError where the
    file cannot be read.
    """
    path = Path(path) / "metrics.jsonl" if os.path.isdir(path) else Path(path)
    return events_in(read_bytes(path, str(path)))


def events_in(content: bytes) -> list[dict[str, Any]]:
    """`read_metrics` of what a file holds."""
    events = []
    for line in content.split(b"\n"):  # not at U+2028 and its like, which a text may hold
        try:
            event = parse_json(line)
        except ValueError:
            break
        if not _is_event(event):
            break
        events.append(event)
    return events


def validation_course(events: Sequence[dict[str, Any]]) -> dict[float, float]:
    """By step the validation loss over all domains, weighted by their tokens; NaN where one of them has none."""
    scores: dict[float, dict[str, tuple[float, float]]] = {}
    for e in events:
        if e["event"] == "eval" and e["step"] is not None:
            loss = math.nan if e["loss"] is None else e["loss"]
            scores.setdefault(e["step"], {})[e["domain"]] = (loss, e["tokens"] or 0)
    course = {}
    for step, of_step in scores.items():
        tokens = sum(count for _, count in of_step.values())
        course[step] = sum(loss * count for loss, count in of_step.values()) / tokens if tokens > 0 else math.nan
    return course


def _is_event(value: Any) -> bool:
    """Whether a line holds what plots and tables read of it."""
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return False
    numbers = [value.get(key, "") for key in _NUMBERS.get(value["event"], ())]
    named = value["event"] != "eval" or isinstance(value.get("domain"), str)
    return named and all(number is None or type(number) in (int, float) for number in numbers)
