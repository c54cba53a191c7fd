"""SIGTERM, SIGINT and SIGHUP to the launcher reach the ranks, which then have time to save."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress

import psutil
import typer

from peftune.cli.stop import NUMBERS
from peftune.errors import Interrupted

AGAIN = "start the same command again, it goes on from the last checkpoint"


class StopSignals:
    """Passes signals on to the ranks, and kills those that have not ended `grace` seconds after the first.

    A thread does it, because torch waits for other machines in C++ code, during which Python runs no signal handler.
    Torch's own handling, which is switched off, would lose the exit codes and orphan the ranks at a second signal.
    """

    def __init__(self, grace: int) -> None:
        self.grace = grace
        self.first: str | None = None
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's --signals-to-handle
        self._received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        for number in NUMBERS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._sent.fileno())
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            number = signal.Signals(self._received.recv(1)[0])
            if self.first is not None:
                send_to_ranks(number)
            elif send_to_ranks(signal.SIGTERM):  # a rank that is still importing ends by it in silence
                self.first = number.name
                timer = threading.Timer(self.grace, send_to_ranks, [signal.SIGKILL])
                timer.daemon = True
                timer.start()
            else:
                say(f"{number.name} before any rank had started; {AGAIN}")
                os._exit(Interrupted.exit_code)


def send_to_ranks(number: signal.Signals) -> int:
    """Send a signal to the processes that this one has started; how many there are."""
    ranks = psutil.Process().children()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    return len(ranks)


def say(text: str) -> None:
    typer.echo(f"peftune: {text}", err=True)
