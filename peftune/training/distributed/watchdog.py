"""A lost rank ends the job under any launcher: each rank sends heartbeats and watches those of its two neighbours.

A killed process closes its connections, which the others notice at once. A machine that loses power or network does
not: its peers would wait in a collective for as long as the network library lets them.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # PyTorch lists it nowhere

from peftune.errors import RankLost

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOST_AFTER = 60.0  # seconds; PEFTUNE_LOST_AFTER says otherwise
_RENDEZVOUS_TIMEOUT = 300.0  # seconds from the start of a rank, imports excluded


@contextmanager
def rendezvous_deadline() -> Iterator[None]:
    """End this process if the rendezvous hangs; some launchers leave restarted ranks waiting for dead ones."""
    reason = f"the ranks have not found each other within {_RENDEZVOUS_TIMEOUT:.0f} s"
    timer = threading.Timer(_RENDEZVOUS_TIMEOUT, _leave, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def watch_peers(accelerator: Accelerator) -> Iterator[None]:
    """Watch the other ranks meanwhile; if one is silent for a minute, say so and end this process.

    The main thread may be waiting for that very rank, so the process ends at once, with exit code 1.
    """
    if accelerator.num_processes == 1:
        yield
        return
    timeout = float(os.environ.get("PEFTUNE_LOST_AFTER", _LOST_AFTER))
    watch = _Watch(accelerator.process_index, accelerator.num_processes, timeout)
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
        self.neighbours = sorted({(rank + 1) % ranks, (rank - 1) % ranks})
        now = time.monotonic()
        self.heard = dict.fromkeys(self.neighbours, now)
        self.beats = dict.fromkeys(self.neighbours, -1)
        self.reached_store = now
        self.done = threading.Event()

    def beat(self) -> None:
        """Increment this rank's counter and read the neighbours'; runs until `done` or until the store is gone."""
        try:
            store = self._store()
            while not self.done.wait(self.timeout / 12):
                store.add(_key(self.rank), 1)
                for other in self.neighbours:
                    self._saw(other, store.add(_key(other), 0))
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

    def _store(self) -> TCPStore:
        host, _, port = _address().rpartition(":")
        return TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self.timeout)
        )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _key(rank: int) -> str:
    """torchrun gives restarted ranks the same store; they must not be taken for those that died."""
    return f"peftune/beats/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _leave(reason: str) -> None:
    text = (
        f"peftune: {reason}: a process, a machine or the network is gone; the job ends here, the same command goes on"
    )
    print(f"{text} from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(RankLost.exit_code)
