"""A lost rank ends the job under any launcher: each rank sends heartbeats and watches those of its two neighbours.

A killed process closes its connections, which the others notice at once. A machine that loses power or network does
not: its peers would wait in a collective for as long as the network library lets them.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # PyTorch lists it nowhere

from peftune.errors import RankLost, UserError, record_for_launcher

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOST_AFTER = 45.0  # seconds; with two beats more the others know it within a minute
_RANKS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def lost_after() -> float:
    """Seconds of silence after which a rank counts as lost; UserError where PEFTUNE_LOST_AFTER is no such number."""
    text = os.environ.get("PEFTUNE_LOST_AFTER", str(_LOST_AFTER))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86_400:
        raise UserError(f"PEFTUNE_LOST_AFTER is {text!r}; expected seconds, from 1 to 86400")
    return seconds


def ranks_started() -> int:
    """How many ranks the launcher says there are; UserError where what it says cannot be."""
    told = {name: os.environ.get(name, "") for name in _RANKS}
    if told["WORLD_SIZE"] in ("", "1"):
        return 1
    described = " ".join(f"{name}={value}" for name, value in told.items())
    numbers = [told[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")]
    if not told["MASTER_ADDR"] or not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"{described}: a launcher sets all five; start ranks by one, or unset WORLD_SIZE for one process"
        )
    if int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise UserError(f"{described}: expected a RANK below WORLD_SIZE")
    return int(told["WORLD_SIZE"])


@contextmanager
def rendezvous_deadline() -> Iterator[None]:
    """End this process if the rendezvous hangs; some launchers leave restarted ranks waiting for dead ones."""
    ranks, seconds = ranks_started(), lost_after()
    if ranks == 1:
        yield
        return
    reason = f"{ranks} ranks have not found each other at {_address()} within {seconds:.0f} s"
    timer = threading.Timer(seconds, _leave, [f"{reason} (PEFTUNE_LOST_AFTER=SECONDS waits longer)"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def watch_peers(accelerator: Accelerator) -> Iterator[None]:
    """Watch the other ranks meanwhile, where there are any; if one is silent for too long, say so and end this process.

    The main thread may be waiting for that very rank, so the process ends at once, with exit code 1.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = _Watch(accelerator.process_index, accelerator.num_processes, lost_after())
    threads = [threading.Thread(target=work, daemon=True) for work in (watch.beat, lambda: watch.guard(_leave))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watch.done.set()
        for thread in threads:  # a thread inside the store while the interpreter goes away would abort the process
            thread.join(timeout=5)


class _Watch:
    """When this rank last saw its neighbours' heartbeats, and last reached the store that carries them."""

    def __init__(self, rank: int, ranks: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        # Here, not in the thread: the first rank, which has the store, may end as soon as all have agreed to.
        host, _, port = _address().rpartition(":")
        wait = timedelta(seconds=timeout)
        self.store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=wait)
        self.neighbours = sorted({(rank + 1) % ranks, (rank - 1) % ranks})
        now = time.monotonic()
        self.heard = dict.fromkeys(self.neighbours, now)
        self.beats = dict.fromkeys(self.neighbours, -1)
        self.reached_store = now
        self.done = threading.Event()

    def beat(self) -> None:
        """Increment this rank's counter and read the neighbours'; runs until `done` or until the store is gone."""
        try:
            while not self.done.wait(self.timeout / 12):
                self.store.add(_key(self.rank), 1)
                for other in self.neighbours:
                    self._saw(other, self.store.add(_key(other), 0))
                self.reached_store = time.monotonic()
        except RuntimeError:  # every error of the store is one; the guard notices when it lasts too long
            return

    def guard(self, leave: Callable[[str], None]) -> None:
        """Call `leave` with the reason once a neighbour has been silent for too long."""
        while not self.done.wait(self.timeout / 12):
            now = time.monotonic()
            if now - self.reached_store > self.timeout:
                leave(f"rank {self.rank} has not reached the store at {_address()} for {self.timeout:.0f} s")
            for other, last in self.heard.items():
                if now - last > self.timeout:
                    leave(f"rank {self.rank} has not heard of rank {other} for {self.timeout:.0f} s")

    def _saw(self, other: int, count: int) -> None:
        if count != self.beats[other]:
            self.beats[other] = count
            self.heard[other] = time.monotonic()


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _key(rank: int) -> str:
    """torchrun gives restarted ranks the same store; they must not be taken for those that died."""
    return f"peftune/beats/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _leave(reason: str) -> None:
    text = (
        f"peftune: {reason}: a process, a machine or the network is gone; the job ends here, the same command goes on "
        "from the last checkpoint"
    )
    record_for_launcher(text)
    print(text, file=sys.stderr, flush=True)
    os._exit(RankLost.exit_code)
