"""SIGTERM, SIGINT and SIGHUP end the program within seconds, in one line, whatever it is doing.

A signal becomes the exception `Stopped` in the main thread, so that what is being written is removed on the way out.
Where that takes too long, or the main thread is inside of a library's C code, a second thread removes it and ends the
process. Who sets handlers of its own meanwhile (the training loop, the server, the launcher) is left alone.

Nothing heavy is imported here: this comes before everything else.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from peftune.errors import record_for_launcher

NUMBERS = [signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
_PATIENCE = 2.5  # seconds for the main thread to leave in order
_came: list[int] = []
_said = threading.Lock()


class Stopped(BaseException):
    """A signal has come; no `except Exception` of a library keeps it."""


def install() -> None:
    """Answer the signals from here on, but for those that this process was started to ignore (nohup)."""
    received, sent = socket.socketpair()
    sent.setblocking(False)
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    with suppress(RuntimeError):  # where no thread can be started, the main thread answers alone
        threading.Thread(target=_insist, args=[received, sent], daemon=True).start()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_let_go)  # else a signal to a child would arrive here


@contextmanager
def answered() -> Iterator[None]:
    """Whatever leaves this block after a signal, ends the process by it: libraries turn exceptions into others."""
    try:
        yield
    except BaseException:
        if _came:
            _leave(_came[0])
        raise


def end_with(code: int) -> NoReturn:
    """Leave with a code that is decided, also when a signal comes while the interpreter is closing."""
    for number in NUMBERS:
        if signal.getsignal(number) is _raise:
            signal.signal(number, lambda *_: os._exit(code))
    sys.exit(code)


def _raise(number: int, frame: FrameType | None) -> None:
    if not _came:  # a second one must not break the clearing up
        _came.append(number)
        raise Stopped


def _insist(received: socket.socket, sent: socket.socket) -> None:
    """In a thread: end the process when a signal that is ours has not ended it in time."""
    while True:
        number = received.recv(1)[0]
        if not _is_ours(number):
            continue
        time.sleep(_PATIENCE)
        if _is_ours(number):
            files = sys.modules.get("peftune.files")
            if files is not None:
                files.remove_staged()
            _leave(number)


def _is_ours(number: int) -> bool:
    return signal.getsignal(number) is _raise


def _leave(number: int) -> None:
    """Say it, unless it was said, and end; of the ranks that a launcher started here, the first says it."""
    if not _said.acquire(blocking=False):
        return time.sleep(_PATIENCE)  # the other thread is just doing it
    name = signal.Signals(number).name
    line = f"peftune: stopped by {name}; nothing unfinished was kept, the same command starts again"
    record_for_launcher(line)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # a progress bar, and the cursor that it hides
        os.write(2, f"{clear}{line}\n".encode())
    os._exit(128 + number)


def _let_go() -> None:
    signal.set_wakeup_fd(-1)
    for number in NUMBERS:
        if _is_ours(number):
            signal.signal(number, signal.SIG_DFL)
