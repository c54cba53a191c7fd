"""The way of a request: choices into the engine, chunks out of it, as one JSON object or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from peftune.inference.request import Request as EngineRequest
from peftune.serve.openai.chunks import ChoiceFormatter, Chunk, join
from peftune.serve.openai.errors import ApiError, draining, internal_error
from peftune.serve.openai.prompts import Prompt, max_new_tokens
from peftune.serve.openai.schema import SamplingRequest
from peftune.serve.openai.submission import Submission
from peftune.serve.service import ResolvedModel, service_of

_log = logging.getLogger("peftune.serve")
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for it
_KEEP_ALIVE_SECONDS = 15.0  # of silence, after which a stream sends a comment so that no proxy closes it


@dataclass(frozen=True)
class ResponseFormat:
    """How an endpoint's response looks: the object's name, in full and in a stream, and a choice in each.

    A choice gets its index and its chunk. A text that begins with `lead` loses it.
    """

    object: str
    chunk_object: str
    id_prefix: str
    choice: Callable[[int, Chunk], dict[str, Any]]
    stream_choice: Callable[[int, Chunk], dict[str, Any]]
    lead: str = ""


@dataclass(frozen=True)
class ChoiceSettings:
    """What the choices of a request have in common; `max_tokens` None leaves it to `default_max_tokens`.

    Without that either they may fill the model's positions. `logprobs` is how many of the likeliest tokens to name.
    """

    max_tokens: int | None
    default_max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool = False
    stop: tuple[str, ...] = ()


async def generate(
    http: Request,
    body: SamplingRequest,
    prompts: Sequence[Prompt],
    settings: ChoiceSettings,
    format: ResponseFormat,
    candidates: Sequence[str] | None = None,
) -> Response:
    """Continue every prompt `n` times with the model that the body names; `candidates` are those of `auto`.

    Raises ApiError for a prompt that does not fit, an unknown model, and where the engine's queue is full.
    """
    service = service_of(http)
    n_positions = service.bank.config.n_positions
    max_tokens = [max_new_tokens(p, settings.max_tokens, settings.default_max_tokens, n_positions) for p in prompts]
    model = await service.resolve(body.model, [prompt.input_ids for prompt in prompts], candidates)
    http.state.model = model.name  # for the metrics
    choices = [
        (
            EngineRequest(
                prompt.input_ids,
                model.adapter,
                body.settings(tokens, n, settings.stop),
                logprobs=settings.logprobs,
                echo=settings.echo,
                only_score=tokens == 0,
            ),
            ChoiceFormatter(service.token_text, prompt.text, prompt.ids, settings.echo, format.lead),
        )
        for prompt, tokens in zip(prompts, max_tokens, strict=True)
        for n in range(body.n)
    ]
    response = PendingResponse(http, body, model, choices, sum(len(prompt.ids) for prompt in prompts), format)
    return response.stream() if body.stream else await response.full()


@dataclass(frozen=True)
class PendingResponse:
    """A completion to be generated: `choices` are what the engine is asked for, and what formats its outputs.

    `prompt_tokens` counts each prompt once.
    """

    http: Request
    body: SamplingRequest
    model: ResolvedModel
    choices: Sequence[tuple[EngineRequest, ChoiceFormatter]]
    prompt_tokens: int
    format: ResponseFormat

    async def full(self) -> Response:
        """One JSON object; generation stops once the client has disconnected."""
        submission = self._submit(at_end=True)
        generating = asyncio.ensure_future(self._collect(submission))
        leaving = asyncio.ensure_future(_disconnected(self.http))
        try:
            await asyncio.wait((generating, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not generating.done():
                return Response(status_code=_CLIENT_CLOSED_REQUEST)
            joined = generating.result()
        finally:
            generating.cancel()
            leaving.cancel()
            self._close(submission)
        choices = [self.format.choice(index, chunk) for index, chunk in enumerate(joined)]
        usage = self._usage(sum(len(chunk.ids) for chunk in joined))
        return JSONResponse(self._object(self.format.object, choices) | self.model.routing | {"usage": usage})

    def stream(self) -> Response:
        """Server-sent events; ApiError before the first of them where the engine's queue is full."""
        submission = self._submit(at_end=False)
        return _EventStream(self._events(submission), lambda: self._close(submission))

    def _submit(self, at_end: bool) -> Submission:
        service = service_of(self.http)
        if service.draining:
            raise draining()
        service.adapter_named(self.model.name)  # it may have been unloaded since it was resolved
        submission = Submission(service.engine, [request for request, _ in self.choices], at_end)
        submission.submit()
        service.metrics.prompt_tokens.labels(self._label).inc(self.prompt_tokens)
        return submission

    def _close(self, submission: Submission) -> None:
        metrics, unfinished = service_of(self.http).metrics, submission.close()
        if unfinished:
            metrics.cancelled.labels(self._label).inc(unfinished)
        if submission.first_token is not None:
            seconds = submission.first_token - self.http.state.arrived
            metrics.first_token.labels(self.http.url.path).observe(seconds)

    async def _chunks(self, submission: Submission, timeout: float | None) -> AsyncIterator[tuple[int, Chunk] | None]:
        """(index of the choice, chunk) as they come; None after `timeout` seconds of silence.

        Raises ApiError where the engine gave a choice up.
        """
        async for item in submission.outputs(timeout):
            if item is None:
                yield None
                continue
            index, output = item
            if output.ids:
                service_of(self.http).metrics.generation_tokens.labels(self._label).inc(len(output.ids))
            if output.finish_reason == "error":
                _log.error("the engine gave a request up: %s", output.error)
                raise internal_error()
            if output.finish_reason == "cancelled":  # not by us: we would not be listening
                raise draining()
            yield index, self.choices[index][1].format(output)

    async def _collect(self, submission: Submission) -> list[Chunk]:
        chunks: list[list[Chunk]] = [[] for _ in self.choices]
        async for item in self._chunks(submission, timeout=None):
            if item is not None:
                chunks[item[0]].append(item[1])
        return [join(of_choice) for of_choice in chunks]

    async def _events(self, submission: Submission) -> AsyncIterator[bytes]:
        event = self._object(self.format.chunk_object, [])
        usage: dict[str, Any] = {"usage": None} if self.body.include_usage else {}
        routing, completion_tokens = self.model.routing, 0
        try:
            async for item in self._chunks(submission, _KEEP_ALIVE_SECONDS):
                if item is None:
                    yield b": waiting\n\n"
                    continue
                index, chunk = item
                completion_tokens += len(chunk.ids)
                if not chunk.is_empty:
                    yield _encode(event | {"choices": [self.format.stream_choice(index, chunk)]} | usage | routing)
                    routing = {}  # only in the first event
        except ApiError as error:
            yield _encode(error.body)
            return
        if self.body.include_usage:
            yield _encode(event | {"usage": self._usage(completion_tokens)})
        yield b"data: [DONE]\n\n"

    @property
    def _label(self) -> str:
        return service_of(self.http).metrics_label(self.model.name)

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.format.id_prefix}-{secrets.token_hex(12)}",
            "object": name,
            "created": int(time.time()),
            "model": self.model.name,
            "choices": choices,
        }

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class _EventStream(StreamingResponse):
    """Server-sent events; `close` is called when the stream ends, in whatever way it does.

    Not sse-starlette: it replaces `uvicorn.Server.handle_exit` for the whole process, ends streams at SIGTERM, pings in
    the midst of a busy stream, and takes 6 to 13 µs an event where this takes 1.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx must not buffer
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def _encode(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
