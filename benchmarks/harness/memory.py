"""What a process holds and takes: growth of memory (Linux; CUDA's allocator on a GPU), the time of rounds of steps."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.workers import Channel


def process_memory(key: str) -> int:
    """Bytes of this process by their name in /proc/self/status: VmRSS, RssAnon, RssFile, VmHWM (the peak: psutil has
    no such figure on Linux); 0 where the system has no such file."""
    with suppress(FileNotFoundError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
    return 0


class MemoryGrowth:
    """Bytes above what was held when `begin` was called first; later calls of that change nothing."""

    def __init__(self, device: str = "cpu") -> None:
        self.on_gpu = device == "cuda"
        self.before: int | None = None
        self.files_before = 0

    def begin(self) -> MemoryGrowth:
        if self.before is None and self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif self.before is None:
            self.before, self.files_before = process_memory("VmRSS"), process_memory("RssFile")
            if os.access("/proc/self/clear_refs", os.W_OK):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
        return self

    def grown(self) -> int | None:
        """Largest growth so far; None where the system does not say."""
        if not self.before:
            return None
        return (torch.cuda.max_memory_allocated() if self.on_gpu else process_memory("VmHWM")) - self.before

    def files(self) -> int:
        """Growth of the pages of files held now, libraries' code and what is mapped: the system may drop them."""
        return process_memory("RssFile") - self.files_before


class Clock:
    """Times rounds of optimizer steps that learn from `wanted` real tokens, or a few more; sleeps between them."""

    def __init__(self, channel: Channel, wanted: int, device: str) -> None:
        self.channel, self.wanted, self.growth = channel, wanted, MemoryGrowth(device)
        self.tokens = self.steps = 0

    def begin(self) -> bool:
        """Sleep until a round is asked for, then start the clock; False when there is none."""
        if not self.channel.wait():
            return False
        self.growth.begin()
        self.tokens = self.steps = 0
        self.start, self.busy = time.perf_counter(), time.process_time()
        return True

    def stepped(self) -> bool:
        """After an optimizer step: whether there is another; the value of a round is real tokens per second."""
        self.steps += 1
        if self.tokens < self.wanted:
            return True
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        self.channel.send(
            value=self.tokens / seconds, tokens=self.tokens, seconds=seconds, steps=self.steps,
            grown=self.growth.grown(), cpu_seconds=time.process_time() - self.busy,
        )  # fmt: skip
        return self.begin()


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
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage: Any = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
