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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIGS = {"ddp": "cpu-2", "zero1": "cpu-2-zero1", "zero2": "cpu-2-zero2", "zero3": "cpu-2-zero3"}
MACHINE_ERRORS = 2
_WORDS = ["the", "of", "and", "to", "in", "is", "for", "that", "with", "as", "on", "by", "this", "are", "from", "at"]
_UP = 0x1 | 0x8 | 0x40  # IFF_UP, IFF_LOOPBACK, IFF_RUNNING
_SET_FLAGS = 0x8914  # SIOCSIFFLAGS


def launch(config: Path, program: str, folder: Path, own_network: bool = False) -> None:
    """Run a worker of `benchmarks.ranks` on the ranks that a configuration describes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(ROOT / "benchmarks" / "ranks.py"), f"{program}-rank", str(folder)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    settings |= {"PEFTUNE_CACHE": str(folder / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        in_own_network(command) if own_network else command,
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\n{config.name}: the ranks ended with {done.returncode}")


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
        sys.exit(MACHINE_ERRORS)


def bytes_sent() -> int:
    """What the loopback device of this network has sent; both ends of every connection are here."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def write_text(path: Path, documents: int) -> None:
    """Documents of a few words each, the same every time."""
    chance = random.Random(0)
    texts = (" ".join(chance.choices(_WORDS, k=chance.choice([40, 90, 120]))) for _ in range(documents))
    path.write_text("\n\n".join(texts), encoding="utf-8")


def recipe(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A recipe that learns from `folder`/text.txt and does nothing else; sections are merged into it."""
    made: dict[str, Any] = {
        "base": "builtin:small",
        "data": {"train": str(folder / "text.txt"), "validation": 0, "split_on": "blank-line"},
        "run": {"out": str(folder / name), "eval_every": 0, "save_every": 0},
    }
    for key, value in sections.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


def write_jobs(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """For the ranks to find."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")


def _switch_on_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))


if __name__ == "__main__":
    _switch_on_loopback()
    os.execvp(sys.argv[1], sys.argv[1:])
