"""Growth of a process's memory while it works: its peak less what it held before (Linux; CUDA's allocator on a GPU)."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def process_memory(key: str) -> int:
    """Bytes of this process by their name in /proc/self/status: VmRSS, RssAnon, RssFile, VmHWM (the peak: psutil has
    no such figure on Linux); 0 where the system has no such file."""
    with suppress(FileNotFoundError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
    return 0


class MemoryGrowth:
    """Bytes above what was held at the first `before_first_step`; later calls of that change nothing."""

    def __init__(self, device: str = "cpu") -> None:
        self.on_gpu = device == "cuda"
        self.before: int | None = None
        self.files_before = 0

    def before_first_step(self) -> None:
        if self.before is not None:
            return
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        self.before, self.files_before = process_memory("VmRSS"), process_memory("RssFile")
        if os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew

    def grown(self) -> int | None:
        """Largest growth so far; None where the system does not say."""
        if self.before is None:
            return None
        if self.on_gpu:
            import torch

            return torch.cuda.max_memory_allocated() - self.before
        return process_memory("VmHWM") - self.before if self.before else None

    def files(self) -> int:
        """Growth of the pages of files held now, libraries' code and what is mapped: the system may drop them."""
        return process_memory("RssFile") - self.files_before


@contextmanager
def largest(figure: Callable[[], int]) -> Iterator[list[int]]:
    """The largest growth of a figure while the block runs, looked at every few milliseconds."""
    before, found, done = figure(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            found[0] = max(found[0], figure() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def tensor_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
