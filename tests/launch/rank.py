"""A stand-in for a rank of `peftune train`: joins the others over gloo, works, stops at a signal, ends as asked to.

python rank.py RECIPE [seconds=S] [save=S] [exit=RANK:CODE] [kill=RANK] [out=FILE]

`kill` is for the first attempt only; OUT.killed, or ./killed, marks it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

stop: list[int] = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: stop.append(number))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
asked = dict(argument.split("=") for argument in sys.argv[2:])
killed = Path(f"{asked['out']}.killed" if "out" in asked else "killed")


def summed(value: float) -> float:
    here = torch.tensor([value])
    if world > 1:
        dist.all_reduce(here)
    return here.item()


if world > 1:
    dist.init_process_group("gloo")
assert summed(rank) == sum(range(world))
os.write(1, f"rank {rank} of {world}\n".encode())  # at once, so that two ranks do not share a line
if asked.get("exit", "").startswith(f"{rank}:"):
    os._exit(int(asked["exit"].split(":")[1]))  # sys.exit aborts now and then: gloo's threads are still running
if asked.get("kill") == str(rank) and not killed.exists():
    killed.touch()
    os.kill(os.getpid(), signal.SIGKILL)
until = time.monotonic() + float(asked.get("seconds", 0))
while summed(time.monotonic() < until):
    if summed(bool(stop)):
        time.sleep(float(asked.get("save", 0)))
        sys.exit(3)
    time.sleep(0.05)
if rank == 0 and "out" in asked:
    with open(asked["out"], "a") as file:
        file.write(f"adapter of {world} ranks, trained on {os.environ.get('NODE_RANK', 'one machine')}\n")
if world > 1:
    dist.destroy_process_group()
