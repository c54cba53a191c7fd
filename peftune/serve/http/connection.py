"""HTTP connections with deadlines for the head of a request and for a client that stops reading.

uvicorn itself bounds the size of a head and the time between requests, and passes over a new connection that sends no
request and a client that reads no response: both would hold a connection for ever.
"""

from __future__ import annotations

import asyncio
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from peftune.serve.openai.errors import ApiError

HEAD_SECONDS = 20.0  # for a complete request line and headers on a new connection
KEEP_ALIVE_SECONDS = 75  # between requests; more than a reverse proxy's 60, which should be the one to close
STALL_SECONDS = 30.0  # in which a client must read something of what waits for it
MAX_HEAD_BYTES = 16 << 10
MAX_CONNECTIONS = 900  # below the 1,024 open files that a process may often have


def head_too_large() -> str:
    """What a client is told then."""
    return f"the request line and headers have more than {MAX_HEAD_BYTES} bytes; shorten them"


class TimeoutProtocol(H11Protocol):
    """uvicorn's own with deadlines; its write buffer is bounded by asyncio's high-water mark (64 KiB)."""

    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._expect_head(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP: one line that says why; called while uvicorn handles h11's error, which knows."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        reason = head_too_large() if status == 431 else f"not a valid HTTP request: {error or msg}"
        sent = ApiError(status, reason)
        body = sent.response().body
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + bytes(body))
        self.transport.close()

    def on_response_complete(self) -> None:
        self._expect_head(KEEP_ALIVE_SECONDS)  # before the next request, which may be here already, begins
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _expect_head(self, seconds: float) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(seconds, self._abort_if_idle, self.cycle)

    def _abort_if_idle(self, last: object) -> None:
        """No request has begun since `last`."""
        if self.cycle is last:
            self.transport.abort()
