"""Where the process of an engine begins. What is heavy is imported once the end of the server would be noticed."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from queue import SimpleQueue

from peftune.model.quantized import quiet
from peftune.serve.engines.channel import Channel
from peftune.serve.engines.messages import Assignment, Call


def run(connection: Connection) -> None:
    """The whole life of the process: until the server says so, or has ended, however it did.

    It obeys the server alone. Signals of a terminal or a service manager reach both, and would end texts here that the
    server lets finish.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    calls: SimpleQueue[Call] = SimpleQueue()
    channel = Channel(connection, calls.put, lambda: os._exit(1))
    first = calls.get()
    assignment: Assignment = first.arguments[0]
    if assignment.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = assignment.gpu  # before a library that is imported looks for GPUs
    quiet()

    from peftune.serve.engines import worker

    worker.answer_calls(first.number, assignment, calls.get, channel)
