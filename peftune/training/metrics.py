"""What a run leaves for machines to read: `metrics.jsonl`, one object a line, and experiment trackers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from peftune.errors import UserError
from peftune.training.checkpoint import flatten


class MetricsLog:
    """Appends events on the main process; other ranks call the same methods and write nothing.

    `keep_bytes` truncates the file to what the checkpoint knew, so that a resumed run does not repeat itself.
    """

    def __init__(self, path: Path, accelerator: Accelerator, recipe: dict[str, Any], keep_bytes: int = 0) -> None:
        self.accelerator = accelerator
        self.path = path
        self.file = None
        if accelerator.is_main_process:
            mode = "r+b" if path.exists() else "w+b"
            self.file = open(path, mode, buffering=0)  # noqa: SIM115  closed in close()
            self.file.truncate(min(keep_bytes, path.stat().st_size))
            self.file.seek(0, os.SEEK_END)
        if recipe["run"]["track"]:
            accelerator.init_trackers("peftune", config={key: str(value) for key, value in flatten(recipe).items()})

    def write(self, event: str, **values: Any) -> None:
        """Append one event; numbers that JSON cannot hold become null."""
        if self.file is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            line = json.dumps({"event": event, **finite}, ensure_ascii=False).encode() + b"\n"
            try:
                written = self.file.write(line)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}; checkpoints are intact") from None
            if written != len(line):
                raise UserError(f"{self.path}: the disk is full; checkpoints are intact")
        if self.accelerator.log_with and "step" in values:
            prefix = f"{event}/{values['domain']}" if "domain" in values else event
            logged = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(logged, step=values["step"])

    def size(self) -> int:
        """Bytes written so far."""
        return self.file.tell() if self.file is not None else 0

    def close(self) -> None:
        """Flush to the disk and end the trackers."""
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()
        if self.accelerator.log_with:
            self.accelerator.end_training()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a metrics file; a last line cut short by a crash is passed over."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events
