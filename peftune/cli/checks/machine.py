"""The machine itself: processor, threads, memory, disk, limits of the system, caches. Nothing heavy is imported."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from peftune.cache import cache_directory, check_private
from peftune.cli.cache import contents, in_words
from peftune.cli.checks.result import CheckResult
from peftune.cli.launcher.configuration import usable_cores
from peftune.errors import UserError

_LITTLE_MEMORY, _LITTLE_DISK, _FEW_FILES = 1 << 30, 500 << 20, 256
_MOST_FILES = 100_000  # of a cache whose size is asked for
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def check_processor(facts: dict[str, Any]) -> Iterator[CheckResult]:
    """Instructions and threads; `facts` are those of `torch_facts`."""
    if facts["cpu"] in ("DEFAULT", "NO AVX"):
        yield CheckResult("CPU", "slower", f"torch uses none of its vector instructions ({facts['cpu']})")
    elif not facts["bf16"]:
        yield CheckResult("CPU", "slower", f"it has no products in bf16 ({facts['cpu']}), so fp32 is used")
    else:
        yield CheckResult("CPU", "fine", f"{facts['cpu']} with products in bf16")
    threads, cores = facts["threads"], usable_cores()
    if share := _of_container("cpu.max"):
        quota, period = share
        cores = min(cores, max(1, round(quota / period)))
    asked = os.environ.get("OMP_NUM_THREADS")
    if threads == cores:
        yield CheckResult("threads", "fine", f"{threads}, one for each core")
    elif threads < cores:
        cause = f"OMP_NUM_THREADS is {asked}" if asked else "torch starts no more"
        yield CheckResult("threads", "slower", f"{threads} of {cores} cores are used, as {cause}")
    else:
        yield CheckResult("threads", "slower", f"{threads} threads share {cores} cores; set OMP_NUM_THREADS={cores}")


def check_room() -> Iterator[CheckResult]:
    """Memory, disks, and the limits that the system sets to a process."""
    free = psutil.virtual_memory().available
    for limit in _of_container("memory.max"):
        free = min(free, limit - sum(_of_container("memory.current")))
    advice = "gpt2 takes 1 GB and more to train; end other programs"
    yield _room("memory", free, _LITTLE_MEMORY, advice)
    places = {"here": Path.cwd(), "the cache": cache_directory(), "temporary files": Path(tempfile.gettempdir())}
    for name, path in places.items():
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        yield _room(f"disk of {name} ({there})", shutil.disk_usage(there).free, _LITTLE_DISK, "free some")
    try:
        import resource
    except ImportError:  # Windows
        return
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        yield CheckResult("open files", "broken", f"at most {files}; ulimit -n 1024")
    else:
        yield CheckResult("open files", "fine", f"at most {files:,}")
    if most != resource.RLIM_INFINITY:
        yield _room("largest file", most, _LITTLE_DISK, "ulimit -f unlimited")


def check_caches() -> Iterator[CheckResult]:
    """Whether peftune's cache can be believed, and how large it and the hub's are."""
    root = cache_directory()
    try:
        check_private(root, "tokens")
        there = next(each for each in (root, *root.absolute().parents) if each.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{root}: cannot be written; set PEFTUNE_CACHE to a directory of your own")
        size = in_words(sum(item.bytes for item in contents(root)))
        yield CheckResult("cache", "fine", f"{root}, {size}; peftune cache clear empties it")
    except UserError as error:
        yield CheckResult("cache", "broken", str(error))
    from huggingface_hub.constants import HF_HUB_CACHE

    yield CheckResult("cache of the hub", "fine", f"{HF_HUB_CACHE}, {_size(Path(HF_HUB_CACHE))}")


def _room(name: str, free: int, little: int, advice: str) -> CheckResult:
    words = in_words(max(0, free))
    return CheckResult(name, "fine", words) if free >= little else CheckResult(name, "broken", f"{words}; {advice}")


def _size(folder: Path) -> str:
    total = count = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                total, count = total + os.lstat(os.path.join(directory, name)).st_size, count + 1
        if count > _MOST_FILES:
            return f"more than {in_words(total)}"
    return in_words(total)


def _of_container(name: str) -> list[int]:
    """The numbers of a limit of the container that this process is in; none where it has no such limit."""
    try:
        return [int(word) for word in (_CONTROL_GROUP / name).read_text().split()]
    except (OSError, ValueError):
        return []
