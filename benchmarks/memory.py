"""Growth of a process's memory while it works: its peak less what it held before (Linux; CUDA's allocator on a GPU).

`python -m benchmarks.step_memory` measures a training step with it, `benchmarks.merging` a merge.
"""

from __future__ import annotations

import os
from pathlib import Path

_STATUS = Path("/proc/self/status")


class MemoryGrowth:
    """Bytes above what was held at the first `before_first_step`; later calls of that change nothing."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.before: int | None = None
        self.files_before = 0

    def before_first_step(self) -> None:
        if self.before is None:
            self.before, self.files_before = self._held(), _status("RssFile")
            self._forget_peak()

    def grown(self) -> int | None:
        """Largest growth so far; None where the system does not tell."""
        if self.before is None or (self.device == "cpu" and not _STATUS.is_file()):
            return None
        return self._peak() - self.before

    def files(self) -> int:
        """Growth of the pages of files held now, libraries' code and what is mapped: the system may drop them."""
        return _status("RssFile") - self.files_before

    def _held(self) -> int:
        if self.device == "cuda":
            import torch

            return torch.cuda.memory_allocated()
        return _status("VmRSS")

    def _peak(self) -> int:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return _status("VmHWM")

    def _forget_peak(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(key: str) -> int:
    if not _STATUS.is_file():
        return 0
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
