"""The way of a request: choices into the engine, pieces out of it, as one JSON object or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from peftune.inference.request import Request as EngineRequest
from peftune.inference.request import RequestOutput
from peftune.serve.openai.chunks import ChoiceFormatter, Chunk, join
from peftune.serve.openai.errors import ApiError, broken, draining
from peftune.serve.openai.submission import Work
from peftune.serve.service import Chosen, Service

_log = logging.getLogger("peftune.serve")
_GONE = 499  # as nginx counts a client that left
_SILENCE = 15.0  # seconds after which a waiting stream says a comment, so that nothing between closes it


@dataclass(frozen=True)
class Choice:
    """One text to be written: what the engine is asked, and how it is told."""

    request: EngineRequest
    teller: ChoiceFormatter


@dataclass(frozen=True)
class Shape:
    """How a kind of answer looks: the object's name whole and in a stream, and a choice in each."""

    whole: str
    part: str
    prefix: str
    choice: Callable[[int, Chunk], dict[str, Any]]
    delta: Callable[[int, Chunk], dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """All that it takes to answer one request."""

    service: Service
    chosen: Chosen
    choices: Sequence[Choice]
    prompt_tokens: int
    shape: Shape
    endpoint: str
    arrived: float
    stream_usage: bool = False

    async def whole(self, http: Request) -> Response:
        """One JSON object; nothing more is written once the client has left."""
        pieces: list[list[Chunk]] = [[] for _ in self.choices]
        work = self._submit(at_end=True)
        collecting = asyncio.ensure_future(self._collect(work, pieces))
        leaving = asyncio.ensure_future(_left(http))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=_GONE)  # nobody reads it
            written = collecting.result()
        finally:
            collecting.cancel()
            leaving.cancel()
            self._close(work)
        told = [self.shape.choice(index, join(found)) for index, found in enumerate(pieces)]
        return JSONResponse(self._object(self.shape.whole, told) | {"usage": self._usage(written)})

    def stream(self) -> Response:
        """Server-sent events. Refused before the first of them where the engine has no room."""
        work = self._submit(at_end=False)
        return _Events(self._events(work), lambda: self._close(work))

    def _submit(self, at_end: bool) -> Work:
        if self.service.draining:
            raise draining()
        self.service.named(self.chosen.shown)  # it may have been unloaded since it was chosen
        work = Work(self.service.engine, [choice.request for choice in self.choices], at_end)
        work.submit()
        self.service.metrics.prompt_tokens.add(self.prompt_tokens, self._label)
        return work

    def _close(self, work: Work) -> None:
        metrics, given_up = self.service.metrics, work.close()
        if given_up:
            metrics.cancelled.add(given_up, self._label)
        if work.first_token is not None:
            metrics.first_token.observe(work.first_token - self.arrived, self.endpoint)

    async def _collect(self, work: Work, pieces: list[list[Chunk]]) -> int:
        """Fill `pieces`; how many tokens were written."""
        written = 0
        async for found in work.updates():
            assert found is not None, "without a limit there is no silence"
            index, update = found
            self._count(update)
            written += len(update.ids)
            pieces[index].append(self.choices[index].teller.tell(_good(update)))
        return written

    async def _events(self, work: Work) -> AsyncIterator[bytes]:
        fixed = self._object(self.shape.part, [])
        routing = {"routing": fixed.pop("routing")} if self.chosen.routing is not None else {}  # told once
        usage: dict[str, Any] = {"usage": None} if self.stream_usage else {}
        written = 0
        try:
            async for found in work.updates(_SILENCE):
                if found is None:
                    yield b": waiting\n\n"
                    continue
                index, update = found
                self._count(update)
                written += len(update.ids)
                piece = self.choices[index].teller.tell(_good(update))
                if not piece.is_empty:
                    yield _event(fixed | {"choices": [self.shape.delta(index, piece)]} | usage | routing)
                    routing = {}
        except ApiError as refusal:
            yield _event(refusal.body)
            return
        if self.stream_usage:
            yield _event(fixed | {"usage": self._usage(written)})
        yield b"data: [DONE]\n\n"

    def _count(self, update: RequestOutput) -> None:
        if update.ids:
            self.service.metrics.tokens.add(len(update.ids), self._label)

    @property
    def _label(self) -> str:
        return self.service.label(self.chosen.shown)

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        routing = {"routing": self.chosen.routing} if self.chosen.routing is not None else {}
        return {
            "id": f"{self.shape.prefix}-{secrets.token_hex(12)}",
            "object": name,
            "created": int(time.time()),
            "model": self.chosen.shown,
            "choices": choices,
        } | routing

    def _usage(self, written: int) -> dict[str, int]:
        total = self.prompt_tokens + written
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}


class _Events(StreamingResponse):
    """A stream that gives up its work when it ends, in whatever way it does."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx hands on what it gets at once
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _good(update: RequestOutput) -> RequestOutput:
    """An update that goes on or ends well; else ApiError, and why goes to the log."""
    if update.finish_reason == "error":
        _log.error("the engine gave a request up: %s", update.error)
        raise broken()
    if update.finish_reason == "cancelled":  # not by us: we would not be listening
        raise draining()
    return update


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
