"""Start a program on two CPU ranks as a person starts a run, in a network of its own where bytes are counted."""

from __future__ import annotations

import fcntl
import json
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from peftune.config.recipe import Recipe

ROOT = Path(__file__).parents[1]
CONFIGS = {"ddp": "cpu-2", "zero1": "cpu-2-zero1", "zero2": "cpu-2-zero2", "zero3": "cpu-2-zero3"}
_MACHINE_ERRORS = 2
_WORDS = ["the", "of", "and", "to", "in", "is", "for", "that", "with", "as", "on", "by", "this", "are", "from", "at"]
_UP = 0x1 | 0x8 | 0x40  # IFF_UP, IFF_LOOPBACK, IFF_RUNNING
_SET_FLAGS = 0x8914  # SIOCSIFFLAGS


def launch(
    config: Path, program: str, folder: Path, documents: int, recipes: list[dict[str, Any]], own_network: bool = False
) -> None:
    """Run a worker of `benchmarks.ranks` over recipes, on so many documents of a few words, the same every time."""
    chance = random.Random(0)
    texts = (" ".join(chance.choices(_WORDS, k=chance.choice([40, 90, 120]))) for _ in range(documents))
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "recipes.json").write_text(json.dumps(recipes), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(ROOT / "benchmarks" / "ranks.py"), f"{program}-rank", str(folder)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    settings |= {"PEFTUNE_CACHE": str(folder / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
    command = in_own_network(command) if own_network else command
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\n{config.name}: the ranks ended with {done.returncode}")


def recipes_of(folder: Path) -> Iterator[Recipe]:
    """What a rank is to train, one after the other: `base` and the like, by keys with dots."""
    from peftune.config.recipe import recipe_from

    for number, keys in enumerate(json.loads((folder / "recipes.json").read_text())):
        fixed = {"data.train": str(folder / "text.txt"), "data.validation": 0, "data.split_on": "blank-line"}
        fixed |= {"run.out": str(folder / f"run-{number}"), "run.eval_every": 0, "run.save_every": 0}
        yield recipe_from({}, [f"{key}={json.dumps(value)}" for key, value in {**fixed, **keys}.items()])


def in_own_network(command: list[str]) -> list[str]:
    """A command line that runs another where nothing but one loopback device is, unused so far."""
    return ["unshare", "--user", "--map-root-user", "--net", sys.executable, __file__, *command]


def require_own_network() -> None:
    """End with one line and code 2 where the system gives nobody a network of his own."""
    try:
        done = subprocess.run(in_own_network(["true"]), capture_output=True, text=True)
        reason = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except FileNotFoundError:
        reason = ["no command `unshare` (Linux, util-linux)"]
    if reason:
        print(f"cannot count bytes here, network namespaces are not permitted: {reason[0]}", file=sys.stderr)
        sys.exit(_MACHINE_ERRORS)


def bytes_sent() -> int:
    """What the loopback device of this network has sent; both ends of every connection are here."""
    return int(psutil.net_io_counters(pernic=True, nowrap=False)["lo"].bytes_sent)


if __name__ == "__main__":
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))
    os.execvp(sys.argv[1], sys.argv[1:])
