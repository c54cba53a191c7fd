"""One end of the pipe between the server and the process of an engine; neither waits until the other reads.

What goes through are plain values of ours, pickled. The pipe has no address: only these two processes hold its ends, so
nobody else can send anything, and each sees at once when the other has ended, however it did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from peftune.serve.engines.messages import Call, Reply


class Channel:
    """Threads that send and receive; `on_message` gets every message, `on_end` is called once the other end is gone."""

    def __init__(
        self, connection: Connection, on_message: Callable[[Any], object], on_end: Callable[[], object]
    ) -> None:
        self._connection, self._on_message, self._on_end = connection, on_message, on_end
        self._outgoing: SimpleQueue[Call | Reply | None] = SimpleQueue()
        self._sender, self._receiver = (
            threading.Thread(target=target, name=target.__name__, daemon=True) for target in (self._send, self._receive)
        )
        self._sender.start()
        self._receiver.start()

    def send(self, message: Call | Reply) -> None:
        """Without waiting; nothing happens where the other end is gone."""
        self._outgoing.put(message)

    def flush(self) -> None:
        """Wait until all is sent; nothing can be sent afterwards."""
        self._outgoing.put(None)
        self._sender.join()

    def join(self, timeout: float | None = None) -> bool:
        """Whether the other end is gone and `on_end` done, waiting for so long."""
        self._receiver.join(timeout)
        return not self._receiver.is_alive()

    def _send(self) -> None:
        while True:
            messages = [self._outgoing.get()]
            while not self._outgoing.empty():  # as many as a step brings go together
                messages.append(self._outgoing.get())
            try:
                self._connection.send([message for message in messages if message is not None])
            except OSError:
                return
            if None in messages:
                return

    def _receive(self) -> None:
        try:
            while True:
                for message in self._connection.recv():
                    self._on_message(message)
        except (EOFError, OSError):
            pass
        finally:
            self._on_end()
            self.flush()  # to nobody
            self._connection.close()
